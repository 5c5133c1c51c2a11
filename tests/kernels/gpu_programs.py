"""Compiles programs for a GPU that is not here: a script, one process a GPU.

In a process that has compiled for one kind of GPU, JAX calls the assembler for that
kind ever after. So `compiled` starts a process for each kind, once.

    python gpu_programs.py a100 programs always quantize
"""

import dataclasses
import fcntl
import functools
import importlib
import math
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mosaic_gpu as blockwise
import test_mosaic_gpu_matmul as product
import test_mosaic_gpu_update as step
from kernel_checks import avals

import jaxbnb
import jaxbnb_kernels
from jaxbnb_kernels import _architecture
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.grouped_matmul_blockwise import grouped_matmul_blockwise
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.update_8bit import Moment, update_8bit

# Rows of x, rows of W, columns of W, size of a block, dtype, whether absmax are nested,
# codebook.
PRODUCTS = {
    "few rows": (3, 200, 1024, 64, jnp.bfloat16, False, "nf4"),
    "nested": (40, 200, 512, 32, jnp.bfloat16, True, "nf4"),
    "long blocks": (5, 72, 512, 4096, jnp.float16, False, "nf4"),
    "nested bytes": (3, 200, 512, 64, jnp.bfloat16, True, "int8"),
    "bytes": (20, 72, 256, 128, jnp.float16, False, "fp8_e4m3"),
}
# The same for experts, and the rows of each. Some rows of "bytes" belong to none.
EXPERTS = {
    "nested": ((20, 72, 256, 32, jnp.bfloat16, True, "nf4"), (1, 17, 0, 2)),
    "bytes": ((20, 72, 256, 128, jnp.float16, False, "fp8_e4m3"), (0, 0, 12, 3)),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a process hands back of a program.

    Attributes:
        kernel: the kernel; see `hopper_compiler.Kernel`. None if XLA's code runs.
        text: the optimised program.
        temporary_bytes: bytes of XLA's temporaries.
    """

    kernel: Any
    text: str
    temporary_bytes: int


def _of_product(name, transpose):
    m, n, k, block_size, dtype, nested, codebook = PRODUCTS[name]
    x, codes, absmax = product.operands(
        m, n, k, block_size, dtype, (), transpose, codebook
    )
    options = {"block_size": block_size, "transpose": transpose, "name": codebook}
    if not nested:
        return functools.partial(product.matmul, **options), (x, codes, absmax)
    _, codes, absmax, nested_absmax, offset = product.nest(x, codes, absmax)

    def run(x, codes, absmax, nested_absmax, offset):
        nested = nested_absmax[0], offset[0, 0]
        weight = product.weight_of(codes, absmax, block_size, codebook, nested)
        return product.matmul_blockwise(
            x, weight, transpose=transpose, implementation="mosaic_gpu"
        )

    return run, (x, codes, absmax, nested_absmax, offset)


def experts(name, transpose):
    """Returns rows of a few of four experts, and their matrices."""
    (m, n, k, block_size, dtype, nested, codebook), sizes = EXPERTS[name]
    _, *weight = product.operands(1, n, k, block_size, dtype, (4,), name=codebook)
    x = np.random.default_rng(1).standard_normal((m, k if transpose else n))
    if nested:
        _, codes, absmax, nested_absmax, offset = product.nest(x, *weight)
        weight = codes, absmax, nested_absmax[:, 0], offset[:, 0, 0]
    return x.astype(dtype), np.array(sizes, np.int32), *weight


def _of_experts(name, transpose):
    (_, _, _, block_size, _, _, codebook), _ = EXPERTS[name]

    def run(x, sizes, codes, absmax, *nested):
        weight = product.weight_of(codes, absmax, block_size, codebook, nested or None)
        return grouped_matmul_blockwise(
            x, sizes, weight, transpose=transpose, implementation="mosaic_gpu"
        )

    return run, experts(name, transpose)


def _of_step(name):
    dtype = np.dtype(jnp.bfloat16)
    rule, scalars, signed = step.rule_of(name, True)
    grad, moments, param = step.state_of((11, 256), signed, 256, dtype, dtype)
    return _stepping(rule), (scalars, grad, moments, param), (2, 3)


def _stepping(rule):
    def run(scalars, grad, moments, param):
        options = {"block_size": 256, "implementation": "mosaic_gpu"}
        return update_8bit(rule, scalars, grad, moments, param, **options)

    return run


def _of_one_row(codebook=NF4, dtype=jnp.bfloat16):
    n, k = ONE_ROW

    def run(x, codes, absmax):
        weight = Weight(codes, absmax, None, codebook, 64, k)
        return matmul_blockwise(x, weight, transpose=True)

    codes = jax.ShapeDtypeStruct((n, k // 2), jnp.uint8)
    if codebook is None:
        codes = jax.ShapeDtypeStruct((n, k), jnp.int8)
    absmax = jax.ShapeDtypeStruct((n, k // 64), jnp.float32)
    return run, (jax.ShapeDtypeStruct((1, k), dtype), codes, absmax)


def _of_whole_step():
    tx = jaxbnb.optim.adamw8bit(1e-3)
    params = jax.ShapeDtypeStruct(PARAMETERS, jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    return jaxbnb.optim.fused_step(tx), (params, state, params), (1, 2)


def _of_many(transpose=True):
    """Returns one row of x for each of many matrices, and these."""
    layers, rows, columns = MANY
    x = jax.ShapeDtypeStruct((layers, 1, columns if transpose else rows), jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((layers, rows, columns // 2), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((layers, rows, columns // 64), jnp.float32)
    multiply = functools.partial(product.matmul, transpose=transpose)
    return jax.vmap(multiply), (x, codes, absmax)


def _of_many_steps():
    # As many start as there are tiles, so that the last one can be emulated alone.
    _architecture.Target.at_once = lambda *_: 2**31 - 1
    rule, scalars, (signed,) = step.rule_of("momentum", True)
    values = jax.ShapeDtypeStruct((math.prod(MANY) // 256, 256), jnp.bfloat16)
    codes = jax.ShapeDtypeStruct(values.shape, jnp.uint8)
    absmax = jax.ShapeDtypeStruct((values.shape[0], 1), jnp.float32)
    moments = (Moment(codes, absmax, signed),)
    return _stepping(rule), (scalars, values, moments, values), (2, 3)


# A matrix of Llama 3 8B, and a parameter: those that docs/kernels.md has bytes of.
ONE_ROW, PARAMETERS = (14336, 4096), (8192, 8192)
# All that is compiled for each GPU; everything else is compiled for one of them.
PROGRAMS: dict[str, Callable[[], Any]] = {
    "one row": _of_one_row,
    "one row of int8": functools.partial(_of_one_row, None),
    "whole step": _of_whole_step,
    "dequantize": lambda: (blockwise.dequantize, blockwise.encoded("nf4", 96, 64)),
    "quantize": lambda: (
        blockwise.quantize,
        (blockwise.values_to_encode(96, 64, jnp.bfloat16),),
    ),
    "gradient": functools.partial(_of_product, "few rows", False),
    "gradient of bytes": functools.partial(_of_product, "bytes", False),
    "experts": functools.partial(_of_experts, "nested", True),
}
# All that is compiled for a T4, whose products are in float16.
T4_PROGRAMS = (
    "one row in float16",
    "whole step",
    "quantize",
    "dequantize",
    "embed",
    "adam",
    "product of long blocks",
    "gradient of long blocks",
    "product of bytes",
    "gradient of bytes",
    "experts' product of bytes",
)
# More elements than 32 bits can number.
MANY = 9000, 1024, 2048
MORE_PROGRAMS = {
    "one row in float16": functools.partial(_of_one_row, dtype=jnp.float16),
    "many products": _of_many,
    "many gradients": functools.partial(_of_many, False),
    "many decoded": lambda: (blockwise.dequantize, _of_many()[1][1:]),
    "embed": lambda: (blockwise.embed, blockwise.rows_to_embed()),
    "adam": functools.partial(_of_step, "adam"),
    "lion": functools.partial(_of_step, "lion"),
    **{
        f"{of} of {name}": functools.partial(_of_product, name, of == "product")
        for name in PRODUCTS
        for of in ("product", "gradient")
    },
    **{
        f"experts' {of} of {name}": functools.partial(
            _of_experts, name, of == "product"
        )
        for name in EXPERTS
        for of in ("product", "gradient")
    },
    # The last one, because it changes how many start of all others too.
    "many steps": _of_many_steps,
}


@functools.cache
def compiled(
    gpu: str,
    names: tuple[str, ...],
    setting: str = "always",
    folder: pathlib.Path | None = None,
) -> dict[str, Compiled]:
    """Returns programs for a GPU by name; skips the test where JAX cannot.

    Args:
        gpu: key of `hopper_compiler.GPUS`.
        names: keys of ``PROGRAMS`` and of ``MORE_PROGRAMS``.
        setting: `jaxbnb_kernels.config.mosaic_gpu`.
        folder: folder that keeps them for other processes; None to keep nothing.
    """
    hopper_compiler.mesh()
    if jax.__version_info__ < (0, 11, 1):
        pytest.skip("compiles for other GPUs than Hopper from jax 0.11.1 on")
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return compiled(gpu, names, setting, pathlib.Path(temporary))
    path = folder / f"{gpu} {len(names)} {setting}"
    with open(path.with_suffix(".lock"), "w") as lock:
        # Whoever comes first compiles, and all others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            command = [sys.executable, __file__, gpu, str(path), setting, *names]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        return pickle.loads(path.read_bytes())


def _compile(gpu: str, name: str) -> Compiled:
    run, args, *donated = (PROGRAMS | MORE_PROGRAMS)[name]()
    program, kernels = hopper_compiler.compile_for(
        hopper_compiler.mesh(gpu=gpu),
        lambda *args: run(*args),
        *avals(*args),
        donate_argnums=donated[0] if donated else (),
    )
    (kernel, *others) = kernels or [None]
    assert not others
    temporary = program.memory_analysis().temp_size_in_bytes
    return Compiled(kernel, program.as_text(), temporary)


def main(gpu: str, path: str, setting: Any, *names: str) -> None:
    """Compiles programs, and writes them to a file."""
    jaxbnb_kernels.config.mosaic_gpu = setting
    programs = {name: _compile(gpu, name) for name in names}
    pathlib.Path(path).write_bytes(pickle.dumps(programs))


if __name__ == "__main__":
    # As a module with the name that pickle knows for its classes.
    importlib.import_module("gpu_programs").main(*sys.argv[1:])
