"""GPUs that there are kernels for, and all that differs between them.

A kernel asks `target` what it is traced for. `lowered_for` puts the answer into JAX's
own context, `jax.sharding.AbstractMesh`, where Mosaic GPU looks for it too. JAX traces
again when that context changes.
"""

import dataclasses
import re
from typing import Any, Final

import jax
from jax._src import lib as jax_lib
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh

from jaxbnb_kernels._records import Gpu


@dataclasses.dataclass(frozen=True)
class Architecture:
    """GPUs of one compute capability.

    Attributes:
        kinds: what NVIDIA calls them: nothing else is known of a GPU that is only
            described.
        cores: multiprocessors of the largest common one, for a GPU that does not say.
        shared_bytes: shared memory of a multiprocessor.
        jax: oldest release of JAX whose Mosaic GPU compiles for them.
        has_wgmma: whether a warpgroup multiplies as one. All others have ``mma.sync``,
            for each warp.
        is_turing: whether instructions are missing that came with Ampere: products of
            bfloat16 or of 16 columns, copies that bypass registers, and a maximum that
            keeps NaN.
    """

    kinds: re.Pattern[str]
    cores: int
    shared_bytes: int
    jax: tuple[int, int, int] = (0, 11, 1)
    has_wgmma: bool = False
    is_turing: bool = False


_KIB: Final = 1024
_HOPPER: Final = "9.0"
ARCHITECTURES: Final = {
    "7.5": Architecture(
        re.compile(r"\bT4\b|\bRTX 20\d\d\b|\bQuadro RTX \d000\b"),
        68,
        64 * _KIB,
        is_turing=True,
    ),
    "8.0": Architecture(re.compile(r"\bA(30|100|800)\b"), 108, 164 * _KIB),
    "8.6": Architecture(
        re.compile(r"\bA(2|10|10G|16|40)\b|\bRTX (30\d\d|A\d000)\b"), 82, 100 * _KIB
    ),
    "8.9": Architecture(
        re.compile(r"\bL(4|20|40|40S)\b|\bRTX (40\d\d|\d000 Ada)\b"), 128, 100 * _KIB
    ),
    _HOPPER: Architecture(
        re.compile(r"\bG?H(20|100|200|800)\b"), 132, 228 * _KIB, (0, 10, 2), True
    ),
    "10.0": Architecture(re.compile(r"\bG?B(100|200)\b"), 148, 228 * _KIB),
    "10.3": Architecture(re.compile(r"\bG?B300\b"), 148, 228 * _KIB),
    "12.0": Architecture(re.compile(r"\bRTX (50\d\d|PRO \d000)\b"), 170, 100 * _KIB),
}


# With slots, like its base.
@dataclasses.dataclass(frozen=True, slots=True)
class Target(AbstractDevice):
    """A GPU that a kernel is traced for.

    Attributes:
        compute_capability: a key of ``ARCHITECTURES``, under the name by which Mosaic
            GPU looks for it.
    """

    compute_capability: str

    @property
    def architecture(self) -> Architecture:
        """What is known of such GPUs."""
        return ARCHITECTURES[self.compute_capability]

    @property
    def cores(self) -> int:
        """The number of multiprocessors."""
        return self.num_cores or self.architecture.cores

    def at_once(self, on_h100: int, shared_bytes: int = 0) -> int:
        """Returns how many warpgroups of a kernel run at once.

        Args:
            on_h100: number that run at once on the 132 multiprocessors of an H100. All
                of these GPUs have as many registers a multiprocessor.
            shared_bytes: shared memory that one takes.
        """
        by_registers = on_h100 * self.cores // ARCHITECTURES[_HOPPER].cores
        # The hardware itself takes 1 KiB for each.
        by_memory = self.architecture.shared_bytes // (shared_bytes + _KIB)
        return max(1, min(by_registers, self.cores * by_memory))


HOPPER: Final = Target("NVIDIA H100 80GB HBM3", 132, "cuda", _HOPPER)


def target() -> Target:
    """The GPU that is traced for; an H100 where none is known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if isinstance(device, Target) else HOPPER


def lowered_for(context: mlir.ModuleContext) -> AbstractMesh:
    """Returns an empty mesh that names the GPU that a program is lowered for."""
    (gpu, *_) = [*gpus_of(context), None]
    if gpu is None or gpu.capability not in ARCHITECTURES:
        return AbstractMesh((), ())
    named = Target(gpu.kind, gpu.cores, "cuda", gpu.capability)
    return AbstractMesh((), (), abstract_device=named)


def gpus_of(context: mlir.ModuleContext) -> list[Gpu]:
    """The GPUs that a program may run on; it does not record which of them it will."""
    if tuple(context.platforms) != ("cuda",):
        return []
    devices = context.backend.devices() if context.backend else []
    if not devices or devices[0].platform == "cpu":
        # The program is for another machine's GPU, as of jax.export.
        device: Any = jax.sharding.get_abstract_mesh().abstract_device
        devices = [] if device is None else [device]
    return [gpu for gpu in dict.fromkeys(map(describe, devices)) if gpu]


def describe(device: Any) -> Gpu | None:
    """What is known of a device, or of a description of one; None for a CPU."""
    if device.platform == "cpu":
        return None
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        named = (
            c for c, a in ARCHITECTURES.items() if a.kinds.search(device.device_kind)
        )
        capability = next(named, None)
    cuda = getattr(getattr(device, "client", None), "platform_version", None)
    cores = getattr(device, "core_count", getattr(device, "num_cores", None))
    driver = None if cuda is None else _driver()
    return Gpu(device.device_kind, capability, cuda, cores, driver)


def _driver() -> tuple[int, int] | None:
    # None without JAX's plugin for CUDA.
    versions: Any = jax_lib.cuda_versions
    supported = versions.cuda_driver_get_version() if versions else 0
    # Zero on a machine without a driver, which compiles for another one.
    return (supported, versions.cuda_runtime_build_version()) if supported else None
