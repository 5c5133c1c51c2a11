"""A measured figure, and the machine that it was measured on."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured figure and its limit.

    Attributes:
        name: what was measured.
        value: the measured value.
        unit: unit of the value, e.g. "x bitsandbytes' time" for a ratio of times.
        limit: largest value that is good enough, or None.
        detail: the origin of the value, e.g. the two times of a ratio.
        data: more detail for a file, in JSON's types.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    detail: str = ""
    data: Any = None


def machine() -> dict[str, str]:
    """Returns the hardware and the versions that figures depend on.

    Example:
        >>> sorted(machine())[:3]
        ['bitsandbytes', 'cores', 'cpu']
    """
    packages = ("jaxbnb", "jax", "flax", "optax", "numpy", "torch", "bitsandbytes")
    return {
        "device": str(jax.devices()[0].device_kind),
        "cpu": _find_cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **{name: _find_version(name) for name in packages},
    }


def count_temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled function needs for temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend has no memory analysis")
    return analysis.temp_size_in_bytes


def is_installed(*names: str) -> bool:
    """Whether all of these packages can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def _find_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _find_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()
