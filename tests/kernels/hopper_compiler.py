"""Compiles for a Hopper GPU that is not there.

XLA's CUDA plugin compiles ahead of time from a description of the target: registers,
spills and instructions can be read off a machine without a GPU. It needs two packages,
of the version of jax, and no CUDA libraries:

    pip install --no-deps jax-cuda13-plugin==<version> jax-cuda13-pjrt==<version>

They belong in an environment of their own, or in a folder (``pip install --target``)
on ``PYTHONPATH``: on a machine without a GPU, jax warns of them in every other run.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental import topologies

# The public figures of an H100; only the compute capability decides what is compiled.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 cuda_compute_capability { major: %d minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas said of a kernel, and the PTX it read."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    ptx: str

    @property
    def instructions(self) -> list[str]:
        """The names of all instructions, in order."""
        name = r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)\s"
        return re.findall(name, self.ptx.partition("\n{")[2], re.MULTILINE)

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.instructions)


def mesh(num_devices: int = 1, major: int = 9) -> jax.sharding.Mesh:
    """Devices to compile for; skips the test where the plugin is not installed."""
    if jax.default_backend() != "cpu":
        pytest.skip("compiles for a GPU that is not there: needs JAX_PLATFORMS=cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    shape = f"1x1x{num_devices}"
    try:
        topology = topologies.get_topology_desc(
            shape, platform="cuda", topology=shape, target_config=H100 % major
        )
    except Exception as error:
        pytest.skip(f"no CUDA plugin of jax to compile with: {error}")
    return jax.sharding.Mesh(np.array(topology.devices), ("device",))


def avals(*trees):
    """The shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def lowered_for(mesh, fn, *args):
    """The text of ``fn`` lowered for the devices of ``mesh``, which all have all."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(fn, in_shardings=replicated, out_shardings=replicated)
    return jitted.lower(*avals(*args)).as_text()


def compile_for(mesh, fn, *avals, **jit_kwargs):
    """``(jax.stages.Compiled, [Kernel, ...])`` of ``fn`` on the devices of ``mesh``.

    The kernels are those that had not been compiled before in this process.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jit_kwargs = {"in_shardings": replicated, "out_shardings": replicated} | jit_kwargs
    with tempfile.TemporaryDirectory() as folder, _dumps(folder):
        compiled = jax.jit(fn, **jit_kwargs).lower(*avals).compile()
        reports = sorted(pathlib.Path(folder).glob("*.ptxas"))
        return compiled, [_read(report) for report in reports]


@contextlib.contextmanager
def _dumps(folder):
    """Mosaic GPU reads these at each compilation."""
    wanted = {
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
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

    return Kernel(
        registers=number(r"Used (\d+) registers"),
        spilled_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        ptx=report.with_suffix(".ptx").read_text(),
    )
