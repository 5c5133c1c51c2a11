"""One measured figure, and the machine it was measured on."""

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
    """A figure with what it was set to reach.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: of the value, e.g. "x bitsandbytes" for a ratio of times.
        limit: what the value should stay within, or None.
        detail: what the value comes of, e.g. the two times.
        data: more of that, for a file: lists and dicts, as JSON has them.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    detail: str = ""
    data: Any = None


def machine() -> dict[str, str]:
    """The hardware and the versions that figures depend on.

    Example:
        >>> sorted(machine())[:3]
        ['bitsandbytes', 'cores', 'cpu']
    """
    packages = ("jaxbnb", "jax", "flax", "optax", "numpy", "torch", "bitsandbytes")
    return {
        "device": str(jax.devices()[0].device_kind),
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of temporaries that a compiled function takes."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend has no memory analysis")
    return analysis.temp_size_in_bytes


def installed(*names: str) -> bool:
    """Whether all of these packages can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()
