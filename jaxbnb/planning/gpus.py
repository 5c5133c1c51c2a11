"""The GPUs that a plan knows: data-sheet figures, and devices to compile for."""

import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, Final

from jax.experimental import topologies

# What the driver, its context and libraries such as cuBLAS keep for themselves.
RESERVED_BYTES: Final = 768 << 20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
        name: name, as the driver says it.
        memory_bytes: size of its memory, as the driver says it.
        bandwidth: bytes of memory that it moves per second.
        flops: floating-point operations per second in 16 bits, with sums in float32
            and without sparsity.
        capability: compute capability, major and minor; None if only the memory is
            known.
        cores: number of streaming multiprocessors.
        l2_bytes: size of its second cache.
        threads: most threads on a multiprocessor.
        units: floating-point units of a multiprocessor.
        clock_ghz: clock rate.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    capability: tuple[int, int] | None = None
    cores: int = 0
    l2_bytes: int = 0
    threads: int = 2048
    units: int = 128
    clock_ghz: float = 2.0

    @property
    def usable_bytes(self) -> int:
        """Memory that is left for a program."""
        return self.memory_bytes - RESERVED_BYTES

    @property
    def has_bfloat16(self) -> bool:
        """Whether its matrix units take bfloat16."""
        return self.capability is None or self.capability >= (8, 0)


_MIB = 1 << 20
GPUS: Final[dict[str, Gpu]] = {
    "t4": Gpu(
        *("Tesla T4", 15_360 * _MIB, 320e9, 65e12, (7, 5)),
        *(40, 4 * _MIB, 1024, 64, 1.59),
    ),
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", 81_920 * _MIB, 2039e9, 312e12, (8, 0)),
        *(108, 40 * _MIB, 2048, 64, 1.41),
    ),
    "rtx3090": Gpu(
        *("NVIDIA GeForce RTX 3090", 24_576 * _MIB, 936e9, 71e12, (8, 6)),
        *(82, 6 * _MIB, 1536, 128, 1.70),
    ),
    "rtx4090": Gpu(
        *("NVIDIA GeForce RTX 4090", 24_564 * _MIB, 1008e9, 165e12, (8, 9)),
        *(128, 72 * _MIB, 1536, 128, 2.52),
    ),
    "rtx5090": Gpu(
        *("NVIDIA GeForce RTX 5090", 32_607 * _MIB, 1792e9, 209e12, (12, 0)),
        *(170, 96 * _MIB, 1536, 128, 2.41),
    ),
    "l4": Gpu(
        *("NVIDIA L4", 23_034 * _MIB, 300e9, 121e12, (8, 9)),
        *(58, 48 * _MIB, 1536, 128, 2.04),
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", 81_559 * _MIB, 3350e9, 989e12, (9, 0)),
        *(132, 50 * _MIB, 2048, 128, 1.98),
    ),
    "h200": Gpu(
        *("NVIDIA H200", 143_771 * _MIB, 4800e9, 989e12, (9, 0)),
        *(132, 60 * _MIB, 2048, 128, 1.98),
    ),
    "b200": Gpu(
        *("NVIDIA B200", 183_359 * _MIB, 8000e9, 2250e12, (10, 0)),
        *(148, 126 * _MIB, 2048, 128, 1.96),
    ),
}
_SHARED_KIB = {(7, 5): 64, (8, 0): 164, (8, 6): 100, (8, 9): 100, (12, 0): 100}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by its name, in any spelling: "RTX 4090" is "rtx4090".

    Raises:
        ValueError: it is not known.

    Example:
        >>> find_gpu("RTX 4090").memory_bytes / 2**30 > 23.9
        True
    """
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, GPUS, 1)
    hint = f"; perhaps {near[0]}" if near else ""
    raise ValueError(
        f"the GPU {name!r} is not known{hint}. Known are {', '.join(GPUS)}; for any "
        "other, give its memory, e.g. --memory 24GiB"
    )


def parse_memory(text: str) -> int:
    """Reads a size of memory, such as "24GiB", "24 GB" or "24564MiB", in bytes.

    Raises:
        ValueError: it is not a size.

    Example:
        >>> parse_memory("24GiB") == 24 * 2**30
        True
    """
    units = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
    units |= {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        assert match is not None
        size = int(float(match[1]) * units[match[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise ValueError(
            f"{text!r} is not a size of memory; write it as 24GiB or 24GB"
        ) from None
    if size <= 0:
        raise ValueError(f"a memory must be larger than nothing, got {text!r}")
    return size


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin, which compiles for GPUs, is installed."""
    names = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(importlib.util.find_spec(name) is not None for name in names)


def absent_device(gpu: Gpu) -> Any:
    """Makes a device to compile for, without the GPU."""
    return absent_devices(gpu, 1)[0]


def absent_devices(gpu: Gpu, count: int) -> Sequence[Any]:
    """Makes devices of one process to compile for, without the GPUs."""
    assert gpu.capability is not None
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    major, minor = gpu.capability
    shared = _SHARED_KIB.get(gpu.capability, 228) << 10
    in_block = shared if gpu.capability == (7, 5) else shared - 1024
    target = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {in_block}
  threads_per_core_limit: {gpu.threads} core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth or 0)} l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{gpu.name}"
"""
    shape = f"1x1x{count}"
    topology = topologies.get_topology_desc(
        shape, platform="cuda", topology=shape, target_config=target
    )
    return topology.devices
