"""The kernels for Hopper, on machines without one.

Their choice, on the CPU and for devices that are not there. Their numbers, three ways:
the jnp twins of what is below Pallas, exhaustively; the kernels interpreted; and the
compiled kernels, emulated instruction by instruction and compared bit for bit. What the
compiler made of them: registers, spills and instructions an element.
"""

import functools
import pathlib
import re
import subprocess
import sys

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest

from jaxbnb_kernels import _hopper, _registers
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED, FP4, NF4
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, mosaic_gpu

CODEBOOKS = {
    "nf4": NF4,
    "fp4": FP4,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def dequantize(codes, absmax, name="nf4", implementation="mosaic_gpu", **options):
    """Of rows in blocks of 64, to bfloat16, unless told otherwise."""
    per_byte = 2 if len(CODEBOOKS[name]) == 16 else 1
    options = {"block_size": 64, "dtype": jnp.bfloat16} | options
    options = {"size": codes.shape[-1] * per_byte} | options
    return dequantize_blockwise(
        codes, absmax, CODEBOOKS[name], implementation=implementation, **options
    )


def encoded(name, blocks, block_size, seed=0):
    """Random codes and absmax, and extremes: as NumPy."""
    generator = np.random.default_rng(seed)
    per_byte = 2 if len(CODEBOOKS[name]) == 16 else 1
    codes = generator.integers(0, 256, blocks * block_size // per_byte)
    absmax = generator.standard_normal(blocks).astype(np.float32)
    extremes = [np.nan, np.inf, 0.0, -0.0, 3e38, 1e-45, 1.2e-38]
    absmax[: len(extremes)] = extremes[:blocks]
    return codes.astype(np.uint8), absmax


def avals(*arrays):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


# Which one runs.


def test_off_a_gpu_the_kernel_refuses():
    codes, absmax = encoded("nf4", 4, 64)
    message = r"needs a GPU of compute capability 9.0; this is lowered for cpu"
    with pytest.raises(NotImplementedError, match=message):
        dequantize(codes, absmax)
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(dequantize)(codes, absmax)


def test_on_another_gpu_the_kernel_refuses():
    mesh = hopper_compiler.mesh(major=8)
    with pytest.raises(NotImplementedError, match=r"9.0; this one's is 8.0"):
        hopper_compiler.compile_for(mesh, dequantize, *avals(*encoded("nf4", 4, 64)))


def test_arrays_that_the_compiler_divides_are_refused():
    mesh = hopper_compiler.mesh(num_devices=2)
    with pytest.raises(NotImplementedError, match="call it within shard_map"):
        hopper_compiler.compile_for(mesh, dequantize, *avals(*encoded("nf4", 4, 64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 16}, r"blocks of \(32, .* 4096\) elements; got 16"),
        ({"block_size": 8192}, r"blocks of \(32, .* 4096\) elements; got 8192"),
        ({"block_size": 96}, r"blocks of \(32, .* 4096\) elements; got 96"),
        ({"dtype": jnp.float8_e4m3fn}, "no float8_e4m3fn"),
    ],
)
def test_what_the_kernel_does_not_serve(options, message):
    block_size = options.get("block_size", 64)
    codes = jnp.zeros(block_size // 2, jnp.uint8)
    with pytest.raises(NotImplementedError, match=message):
        dequantize(codes, jnp.ones(1), **options)


def test_linear_int8_is_not_served():
    with pytest.raises(NotImplementedError, match="no linear int8"):
        dequantize_blockwise(
            jnp.zeros(64, jnp.int8),
            jnp.ones(1),
            None,
            block_size=64,
            size=64,
            implementation="mosaic_gpu",
        )


def lowered_for(mesh, fn, *args):
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(fn, in_shardings=replicated, out_shardings=replicated)
    return jitted.lower(*avals(*args)).as_text()


def test_by_default_it_is_chosen_only_when_switched_on_and_on_hopper(monkeypatch):
    args = encoded("nf4", 64, 64)

    def text(mesh):
        # A function of its own, as traces are cached.
        return lowered_for(mesh, lambda *a: dequantize(*a, implementation=None), *args)

    hopper, ampere = hopper_compiler.mesh(), hopper_compiler.mesh(major=8)
    two = hopper_compiler.mesh(num_devices=2)
    assert "mosaic_gpu" not in text(hopper)
    monkeypatch.setattr(_hopper, "PREFERRED", True)
    assert "mosaic_gpu" in text(hopper)
    assert "mosaic_gpu" not in text(ampere)
    assert "mosaic_gpu" not in text(two)


@every_dtype
def test_switched_on_the_cpu_has_the_same_numbers(dtype, monkeypatch):
    codes, absmax = encoded("nf4", 12, 64)
    codes, absmax = codes.reshape(3, 128), absmax.reshape(3, 4)

    def transformed(codes, absmax):
        # A function of its own, as traces are cached.
        def run(codes, absmax):
            return dequantize(codes, absmax, implementation=None, dtype=dtype)

        def total(absmax, codes):
            decoded = run(codes, absmax)
            return jnp.sum(jnp.nan_to_num(decoded.astype(jnp.float32)) * 0.01)

        return str(jax.make_jaxpr(run)(codes, absmax)), (
            run(codes, absmax),
            jax.jit(run)(codes, absmax),
            jax.vmap(run)(codes, absmax),
            jax.vmap(run, (1, None), 1)(codes.T, absmax[0]),
            jax.lax.map(lambda row: run(*row), (codes, absmax)),
            jax.grad(total)(absmax, codes),
            jax.vmap(jax.grad(total))(absmax, codes),
            jax.jvp(lambda a: run(codes, a), (absmax,), (jnp.ones_like(absmax),)),
        )

    jaxpr, expected = transformed(codes, absmax)
    assert "hopper_or_portable" not in jaxpr
    monkeypatch.setattr(_hopper, "PREFERRED", True)
    jaxpr, got = transformed(codes, absmax)
    assert "hopper_or_portable" in jaxpr
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


def test_within_shard_map_it_is_chosen():
    mesh = hopper_compiler.mesh(num_devices=2)
    spec = jax.sharding.PartitionSpec("device")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    codes, absmax = encoded("nf4", 128, 64)
    fn = jax.shard_map(dequantize, mesh=mesh, in_specs=spec, out_specs=spec)
    jitted = jax.jit(fn, in_shardings=sharding, out_shardings=sharding)
    assert "mosaic_gpu" in jitted.lower(*avals(codes, absmax)).as_text()


# The numbers.


def test_the_look_up_of_every_byte():
    bytes_ = jnp.arange(256, dtype=jnp.uint8)
    table = jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.float32)
    np.testing.assert_array_equal(_registers.look_up_twin(bytes_, table), table)
    pairs = jax.lax.bitcast_convert_type(bytes_, jnp.uint4)
    got = _registers.look_up_twin(pairs.reshape(1, 512), table[:16])
    # The first element of a byte is in its high half.
    high_low = np.stack([np.arange(256) >> 4, np.arange(256) & 15], axis=-1)
    np.testing.assert_array_equal(got, table[high_low.reshape(1, 512)])


def test_interpreted():
    script = pathlib.Path(__file__).with_name("interpret_kernels.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@functools.cache
def compiled_dequantize(name, blocks, block_size, dtype):
    """The compiled program and its kernel, which is the same for each codebook."""
    args = encoded(name, blocks, block_size)
    fn = functools.partial(dequantize, name=name, block_size=block_size, dtype=dtype)
    compiled, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(), lambda *args: fn(*args), *avals(*args)
    )
    return compiled, kernel


def emulated_dequantize(kernel, name, codes, absmax, block_size, dtype):
    dtype = np.dtype(dtype)
    size = len(absmax) * block_size
    rows, columns = mosaic_gpu.tile_of(block_size, dtype)
    # What is not written is found out.
    out = np.full(size * dtype.itemsize, 0xA5, np.uint8)
    table = np.resize(CODEBOOKS[name], max(128, len(CODEBOOKS[name])))
    ptx_emulator.run(
        kernel.ptx,
        [x.view(np.uint8) for x in (codes, absmax, table)] + [out],
        grid=(-(-len(absmax) // rows), block_size // columns, 1),
    )
    return out.view(dtype)


def decoded_by_numpy(codes, absmax, name, block_size, dtype):
    """The specification; unlike XLA on a CPU, NumPy has float32's subnormals."""
    if len(CODEBOOKS[name]) == 16:
        codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = CODEBOOKS[name][codes] * np.repeat(absmax, block_size)
        return exact.astype(dtype)


# A tile and a half, or a block more than a tile.
def num_blocks(block_size):
    return max(4096 * 3 // 2 // block_size, 5)


@every_dtype
@pytest.mark.parametrize("block_size", mosaic_gpu.BLOCK_SIZES)
@pytest.mark.parametrize("names", [("nf4", "fp4"), ("dynamic8", "dynamic8_unsigned")])
def test_emulated_dequantize(names, block_size, dtype):
    blocks = num_blocks(block_size)
    compiled, kernel = compiled_dequantize(names[0], blocks, block_size, dtype)
    for name in names:
        codes, absmax = encoded(name, blocks, block_size)
        got = emulated_dequantize(kernel, name, codes, absmax, block_size, dtype)
        expected = decoded_by_numpy(codes, absmax, name, block_size, dtype)
        np.testing.assert_array_equal(
            got.astype(np.float32), expected.astype(np.float32)
        )
    check_compiled(compiled, kernel)


def check_compiled(compiled, kernel, instructions=9):
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    # 2,048 threads, all that a multiprocessor holds, share 65,536 registers in units
    # of eight: with 64 each there are half of them, enough to hide the memory.
    assert kernel.registers <= 64
    assert len(kernel.instructions) <= instructions * 32
    # Nothing around the kernel: no copy of an operand, no temporary.
    operations = re.findall(
        r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\(", compiled.as_text(), re.MULTILINE
    )
    allowed = {"parameter", "constant", "bitcast", "custom-call", "get-tuple-element"}
    assert set(operations) <= allowed, operations
    assert operations.count("custom-call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes == 0
