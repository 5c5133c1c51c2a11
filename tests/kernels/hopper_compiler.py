"""Compiles for an absent GPU.

XLA's CUDA plugin compiles ahead of time from a description of the target, so registers,
spills and instructions can be counted without a GPU. ``make kernels`` installs the
plugin and the disassembler in a separate folder, because jax would warn about the
plugin in every other run on a machine without a GPU.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental import topologies

# Names and numbers of multiprocessors; of the rest only the compute capability, which
# `mesh` adds, affects compilation.
GPUS = {
    "v100": ("Tesla V100-SXM2-16GB", "7.0", 80),
    "t4": ("Tesla T4", "7.5", 40),
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 108),
    "rtx3090": ("NVIDIA GeForce RTX 3090", "8.6", 82),
    "rtx4090": ("NVIDIA GeForce RTX 4090", "8.9", 128),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132),
    "b200": ("NVIDIA B200", "10.0", 148),
    "b300": ("NVIDIA B300", "10.3", 148),
    "rtx5090": ("NVIDIA GeForce RTX 5090", "12.0", 170),
}
CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: %d
  shared_memory_per_block: 49152 shared_memory_per_core: %d
  shared_memory_per_block_optin: %d core_count: %d fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 cuda_compute_capability { major: %d minor: %d %s }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "%s"
"""
# Pallas compiles for "sm_120a", which ptxas refuses as long as the target is "sm_120".
OWN_FEATURES = {"12.0": "feature_extension: ACCELERATED_FEATURES"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its PTX, its machine code and ptxas' report.

    Attributes:
        registers: registers of a thread.
        spilled_bytes: bytes of registers that spill to memory.
        stack_bytes: bytes of a thread's stack.
        remarks: ptxas' remarks on what it could not do as intended.
        ptx: text of the PTX.
        sass: names of the machine's instructions, in order, without padding.
        loop: the longest loop in ``sass``.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int
    remarks: list[str]
    ptx: str
    sass: tuple[str, ...]
    loop: tuple[str, ...]

    def count(self, prefix: str) -> int:
        """Counts the machine's instructions that begin with a prefix."""
        return sum(name.startswith(prefix) for name in self.sass)


def mesh(num_devices: int = 1, gpu: str = "h100") -> jax.sharding.Mesh:
    """Makes devices to compile for; skips the test without the plugin."""
    if jax.default_backend() != "cpu":
        pytest.skip("compiles for a GPU that is not there: needs JAX_PLATFORMS=cpu")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("no CUDA plugin of jax to compile with: see `make kernels`")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    shape = f"1x1x{num_devices}"
    topology = topologies.get_topology_desc(
        shape, platform="cuda", topology=shape, target_config=_config(gpu)
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("device",))


def _config(gpu: str) -> str:
    name, capability, cores = GPUS[gpu]
    kinds = {"7.5": 64, "8.0": 164, "8.6": 100, "8.9": 100, "12.0": 100}
    shared = kinds.get(capability, 228) << 10
    threads = {64: 1024, 100: 1536}.get(shared >> 10, 2048)
    major, minor = map(int, capability.split("."))
    features = OWN_FEATURES.get(capability, "")
    sizes = threads, shared, shared - 1024, cores
    return CONFIG % (*sizes, major, minor, features, name)


def compile_for(mesh, fn, *avals, **jit_kwargs):
    """Compiles ``fn`` for ``mesh``: ``(jax.stages.Compiled, [Kernel, ...])``.

    Returns only kernels that this process had not compiled before.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jit_kwargs = {"in_shardings": replicated, "out_shardings": replicated} | jit_kwargs
    with tempfile.TemporaryDirectory() as folder, _dumps(folder):
        lowered = jax.jit(fn, **jit_kwargs).lower(*avals)
        compiled = lowered.compile()
        reports = sorted(pathlib.Path(folder).glob("*.ptxas"))
        return compiled, [_read(report) for report in reports]


@contextlib.contextmanager
def _dumps(folder):
    """Sets the variables that Mosaic GPU reads at each compilation."""
    # Importing it overwrites the path of the disassembler.
    importlib.import_module("jax.experimental.mosaic.gpu")
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    cuda = str(pathlib.Path(plugin.origin).parents[1] / "nvidia/cu13")
    wanted = {
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "MOSAIC_GPU_CUDA_ROOT": cuda,
        # jaxlib 0.10.2 uses this name.
        "CUDA_ROOT": cuda,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read(report: pathlib.Path) -> Kernel:
    text = report.read_text()

    def number(pattern):
        return sum(int(n) for n in re.findall(pattern, text))

    (sass,) = report.parent.glob(f"{report.stem}.sass*")
    program, loop = _disassembled(sass.read_text())
    return Kernel(
        registers=number(r"Used (\d+) registers"),
        spilled_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        # Such as products that it had to serialise.
        remarks=re.findall(r".*(?:\(C\d+\)|warning).*", text),
        ptx=report.with_suffix(".ptx").read_text(),
        sass=program,
        loop=loop,
    )


def _disassembled(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the instructions' names up to the last exit, and the longest loop's.

    Parses lines like ``.L_x_1:``, a label, and ``... /*0a10*/  @!P0 BRA `(.L_x_1)``: an
    address, a predicate, a name and a target.
    """
    line = r"(?m)^(\.L_x_\d+):|/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)"
    names, labels, loop = [], {}, ()
    for label, name, operands in re.findall(line, text):
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        target = re.search(r"\.L_x_\d+", operands)
        if name.startswith("BRA") and target and target[0] in labels:
            loop = max(loop, tuple(names[labels[target[0]] :]), key=len)
    # After the last exit come a jump to itself and padding.
    return tuple(names[: len(names) - names[::-1].index("EXIT")]), loop
