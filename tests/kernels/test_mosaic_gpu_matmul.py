"""The product with a 4-bit matrix for Hopper, on machines without one.

test_mosaic_gpu.py tests which implementation runs, for all kernels. This file checks
numbers: the decoder's twin, exhaustively, and the compiled kernel, emulated instruction
by instruction and compared with float64 within the bound that `Config` states. It also
counts registers and instructions per weight, and checks that no product is serialised.
"""

import collections
import contextlib
import functools
import re

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
from kernel_checks import avals, check_compiled, lowered_for

from jaxbnb_kernels import config, errors
from jaxbnb_kernels._mosaic_gpu import pallas
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, FP4, FP8_E4M3, NF4
from jaxbnb_kernels.matmul_blockwise import (
    Weight,
    matmul_blockwise,
    mosaic_gpu_kernel,
)
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_forward as forward
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax, quantize_absmax

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
# Linear int8 does not have one.
BYTE_CODEBOOKS = {"int8": None, "fp8_e4m3": FP8_E4M3, "dynamic8": DYNAMIC8_SIGNED}
SIXTEEN_BITS = [jnp.bfloat16, jnp.float16]

both_dtypes = pytest.mark.parametrize(
    "dtype", SIXTEEN_BITS, ids=lambda d: np.dtype(d).name
)
every_codebook = pytest.mark.parametrize("name", CODEBOOKS)


def operands(m, n, k, block_size, dtype, leading=(), transpose=True, name="nf4"):
    """Returns a random x, and codes and absmax of W ``(n, k)``, as NumPy."""
    generator = np.random.default_rng(0)
    x_shape = *leading, m, k if transpose else n
    x = generator.standard_normal(x_shape).astype(dtype)
    stored = k // 2 if name in CODEBOOKS else k
    codes = generator.integers(0, 256, (*leading, n, stored)).astype(np.uint8)
    if name == "int8":
        codes = codes.view(np.int8)
    elif name in BYTE_CODEBOOKS:
        # Not the NaN of 8-bit floats.
        codes[~np.isfinite(BYTE_CODEBOOKS[name][codes])] = 0
    blocks = -(-k // block_size)
    absmax = np.exp(generator.standard_normal((*leading, n, blocks)) - 3)
    return x, codes, absmax.astype(np.float32)


def nest(x, codes, absmax):
    """Returns the same with doubly quantised absmax, as a kernel takes them."""
    absmax, nested_absmax, offset = map(np.asarray, quantize_absmax(absmax))
    return x, codes, absmax, nested_absmax[..., None, :], offset[..., None, None]


def weight_of(codes, absmax, block_size, name="nf4", nested=None):
    codebooks = CODEBOOKS | BYTE_CODEBOOKS
    size = codes.shape[-1] * (2 if name in CODEBOOKS else 1)
    return Weight(codes, absmax, nested, codebooks[name], block_size, size)


def matmul(x, codes, absmax, block_size=64, transpose=True, name="nf4", **options):
    options = {"implementation": "mosaic_gpu"} | options
    weight = weight_of(codes, absmax, block_size, name)
    return matmul_blockwise(x, weight, transpose=transpose, **options)


# The decoder.


def test_a_permutation_of_each_group():
    """Each product of 16 columns uses two neighbours of each lane, twice."""
    got = np.asarray(fragments.permute(jnp.arange(256), 128)).reshape(2, 8, 2, 4, 2)
    for group, step, half, lane, one in np.ndindex(got.shape):
        # Lane c reads the c-th quarter of the group.
        expected = 128 * group + 32 * lane + 4 * step + 2 * half + one
        assert got[group, step, half, lane, one] == expected


@both_dtypes
@every_codebook
def test_the_twin_decodes_every_byte(name, dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    words = NIBBLES.table(CODEBOOKS[name], np.dtype(dtype))
    got = fragments.decode_twin(jnp.asarray(codes), jnp.asarray(words), dtype)
    # A byte's first element is in its high half.
    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(4, 128)
    levels = CODEBOOKS[name].astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(got, np.float32),
        np.asarray(fragments.permute(levels[pairs], 128), np.float32),
    )


# The compiled kernel.


# The compiler reports a kernel only once; tiles with fewer rows of x share it.
KERNELS = {}


def is_transposed(config):
    """Returns whether a config is for ``x @ W.T``, not ``x @ W``."""
    return isinstance(config, forward.Config)


def kernel_of(name, block_size, dtype, config):
    """Returns a codebook's product of x, codes, absmax and nested absmax."""
    levels = (CODEBOOKS | BYTE_CODEBOOKS)[name]
    fn = functools.partial(
        mosaic_gpu_kernel.matmul,
        codebook=b"" if levels is None else levels.tobytes(),
        block_size=block_size,
        transpose=is_transposed(config),
        compute_dtype=np.dtype(dtype),
        config=config,
    )
    per_byte = 2 if name in CODEBOOKS else 1
    return lambda x, codes, *absmax: fn(
        x, codes, *absmax, size=per_byte * codes.shape[-1]
    )[0]


@functools.cache
def compiled(
    m, n, k, block_size, dtype, config, count=1, x_dtype=None, double_quant=False
):
    """Returns the compiled program and its kernel, the same for each codebook."""
    transpose = is_transposed(config)
    args = operands(m, n, k, block_size, x_dtype or dtype, (count,), transpose)
    args = nest(*args) if double_quant else args
    program, kernels = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        kernel_of("nf4", block_size, dtype, config),
        *avals(*args),
    )
    tokens = -(-m // config.block_m)
    key = tokens, n, k, block_size, dtype, config, count, x_dtype, double_quant
    for kernel in kernels:
        KERNELS[key] = kernel
    return program, KERNELS[key]


# Order in which a kernel first uses its operands, by their number, and its result.
ORDERS = {4: (0, 1, 2, 3, 4), 7: (0, 5, 1, 2, 3, 4, 7, 6)}


def emulated(kernel, name, args, block_size, dtype, config, order=None):
    """Runs the program on the CPU, with an emulated kernel."""
    # Parts with different lengths leave their loops at different times.
    together = -(-args[0].shape[-1] // config.block_k) % config.split_k == 0
    with emulating(kernel, order, together):
        return np.asarray(
            kernel_of(name, block_size, dtype, config)(*map(jnp.asarray, args))
        )


@contextlib.contextmanager
def emulating(kernel, order=None, together=True):
    """Makes calls of Pallas run a compiled kernel on the CPU.

    Yields a list, which gets for each operand which of its bytes were read.
    """
    read = []

    def emulate(_, *, out_type, grid, **__):
        def run(*arrays):
            buffers = [np.array(a).reshape(-1).view(np.uint8) for a in arrays]
            # Elements that are never written stay 0xA5.
            written = np.full(out_type.size * out_type.dtype.itemsize, 0xA5, np.uint8)
            read[:] = [np.zeros_like(b) for b in [*buffers, written]]
            in_order = order or ORDERS[len(buffers)]
            ptx_emulator.run(
                kernel.ptx,
                [[*buffers, written][i] for i in in_order],
                grid=(grid["m"], grid["n"], grid["part"] * grid["matrix"]),
                together=together,
                read=[read[i] for i in in_order],
            )
            return jnp.asarray(written.view(out_type.dtype).reshape(out_type.shape))

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas, "kernel", emulate)
        yield read


def check(y, name, x, codes, absmax, block_size, dtype, config):
    """Compares y with float64, within the bound that `Config` states."""
    k = x.shape[-1]
    levels = (CODEBOOKS | BYTE_CODEBOOKS)[name]
    size = codes.shape[-1] * (2 if name in CODEBOOKS else 1)
    matrix = np.asarray(errors.levels_of(codes, levels, size), np.float64)
    matrix = matrix * np.repeat(absmax, block_size, axis=-1)[..., :size]
    x64 = x.astype(dtype).astype(np.float64)
    matrix = matrix.swapaxes(-1, -2) if is_transposed(config) else matrix
    expected, terms = x64 @ matrix, np.abs(x64) @ np.abs(matrix)
    roundings = 1 if is_transposed(config) and config.folds_absmax else 3
    unit = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    bound = ((1 + unit) ** roundings - 1) * terms
    if roundings == 3 and dtype == jnp.float16:
        bound += 2.0**-24 * np.abs(x64).sum(-1, keepdims=True)
    bound += k * 2.0**-24 * terms * (1 + unit) ** roundings
    # The result is rounded once, or twice if it is a float32 sum first.
    of_result = 2.0 ** -(jnp.finfo(y.dtype).nmant + 1) + 2.0**-24
    bound += of_result * (np.abs(expected) + bound)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error = np.abs(y.astype(np.float64) - expected)
    assert np.all(error <= bound), (error / bound).max()


def check_emulated(
    m, n, k, block_size, dtype, config, count=1, x_dtype=None, double_quant=False
):
    options = m, n, k, block_size, dtype, config, count, x_dtype, double_quant
    program, kernel = compiled(*options)
    x, codes, absmax = args = operands(
        m, n, k, block_size, x_dtype or dtype, (count,), is_transposed(config)
    )
    if double_quant:
        args = nest(*args)
        of_matrix = args[3][:, 0], args[4][:, 0, 0]
        absmax = np.asarray(dequantize_absmax(args[2], *map(jnp.asarray, of_matrix)))
    # The nested absmax does not depend on the matrix's codebook.
    for name in ["nf4"] if double_quant else CODEBOOKS:
        got = emulated(kernel, name, args, block_size, dtype, config)
        check(got, name, x, codes, absmax, block_size, dtype, config)
    return program, kernel


# The rows of W do not fill whole tiles, and the columns have two parts.
@pytest.mark.matrix
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("m", [1, 3, 8, 16, 33, 64, 256])
def test_emulated(m, block_size):
    config = forward.heuristic(m, 200, 1024)
    assert config.split_k == 2 or (m > 32 and config.split_k == 4)
    program, kernel = check_emulated(m, 200, 1024, block_size, jnp.bfloat16, config)
    # A tile has 128 rows and `block_k` columns. A lane has a weight for each column and
    # a float32 sum for each row of x. Sums begin as zeros, are scaled for each group of
    # columns, and are written at the end. Addresses and reads come on top.
    groups = config.block_k // min(block_size, config.block_k)
    instructions = 3 * config.block_k + (2 * groups + 4) * config.block_m + 250
    x_bytes = 2 * -(-m // config.block_m) * config.block_m * 1024
    check_compiled(
        program,
        kernel,
        instructions=instructions,
        elements=1,
        registers=255,
        around={"fusion", "transpose", "reduce", "add", "convert", "pad", "slice"},
        temporary_bytes=x_bytes
        + 4 * config.split_k * -(-m // config.block_m) * config.block_m * 200
        + 1024,
    )


@pytest.mark.parametrize("m", [3, 64, 100])
def test_emulated_in_float16(m):
    config = forward.heuristic(m, 200, 512)
    check_emulated(m, 200, 512, 64, jnp.float16, config)


@pytest.mark.parametrize(
    ("m", "n", "config", "count"),
    [
        # One part; its result has 16 bits at once.
        (8, 128, forward.Config(8, 128, 128, 1), 1),
        (65, 128, forward.Config(128, 128, 64, 1), 1),
        # Parts of two tiles, one tile and one tile.
        (8, 128, forward.Config(8, 128, 128, 3), 1),
        # Tiles of 64 rows.
        (5, 72, forward.Config(8, 64, 128, 2), 1),
        # Several matrices, like experts'.
        (5, 128, forward.Config(8, 128, 128, 2), 3),
    ],
    ids=["one part", "one part of many rows", "uneven parts", "64 rows", "a stack"],
)
def test_emulated_otherwise_divided(m, n, config, count):
    check_emulated(m, n, 512, 64, jnp.bfloat16, config, count)


def test_emulated_of_float32_computed_in_bfloat16():
    config = forward.Config(8, 128, 128, 1)
    check_emulated(8, 128, 512, 64, jnp.bfloat16, config, x_dtype=np.float32)


# More absmax than share a nested one, and not a multiple of that.
@pytest.mark.parametrize(
    ("m", "n", "block_size", "dtype", "config", "count"),
    [
        (3, 200, 32, jnp.bfloat16, forward.Config(8, 128, 128, 2), 1),
        (16, 200, 64, jnp.float16, forward.Config(16, 128, 128, 1), 1),
        (64, 200, 128, jnp.bfloat16, forward.Config(64, 128, 64, 2), 1),
        (100, 200, 64, jnp.bfloat16, forward.Config(128, 128, 64, 1), 1),
        (5, 72, 32, jnp.bfloat16, forward.Config(8, 64, 128, 1), 3),
    ],
    ids=["groups of 32", "float16", "long blocks", "many rows", "a stack"],
)
def test_emulated_of_nested_absmax(m, n, block_size, dtype, config, count):
    program, kernel = check_emulated(
        m, n, 512, block_size, dtype, config, count, double_quant=True
    )
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.remarks == []
    # The absmax never exist as a float32 array, which would have the codes' shape.
    assert f"f32[{count},{n},{512 // block_size}]" not in program.as_text()
    assert f"f32[{n},{512 // block_size}]" not in program.as_text()


@pytest.mark.matrix
@both_dtypes
@every_codebook
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_emulated_decoder_of_every_byte(block_size, name, dtype):
    """The unit matrix gives the levels themselves, with each byte in each place."""
    config = forward.Config(64, 64, 128 if block_size == 128 else 64, 1)
    _, kernel = compiled(128, 256, 128, block_size, dtype, config)
    x = np.eye(128, dtype=dtype)[None]
    row, byte = np.indices((256, 64))
    codes = ((row + 37 * byte) % 256).astype(np.uint8)[None]
    for column in codes[0].T:
        assert len(set(column.tolist())) == 256
    absmax = np.ones((1, 256, 128 // block_size), np.float32)
    got = emulated(kernel, name, (x, codes, absmax), block_size, dtype, config)
    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(256, 128)
    levels = CODEBOOKS[name].astype(dtype)[pairs]
    np.testing.assert_array_equal(
        got[0].T.astype(np.float32), levels.astype(np.float32)
    )


@pytest.mark.matrix
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("m", [8, 16, 64, 128])
def test_instructions_a_weight(m, double_quant):
    """Counts the loop over tiles, which takes almost all of the time."""
    config = forward.heuristic(m, 4096, 4096)
    _, kernel = compiled(
        m, 4096, 4096, 64, jnp.bfloat16, config, double_quant=double_quant
    )
    weights = config.block_n * config.block_k / 128
    counts = collections.Counter(name.split(".")[0] for name in kernel.loop)
    # Two bytes per weight, from three PRMT for four and a quarter to pair them, take 2.
    # Six more prepare the selectors of eight weights: 2.75, some of them shared.
    of_absmax = config.block_k // 64 if double_quant else 0
    assert 2 * weights <= counts["PRMT"] <= 2 * weights + of_absmax
    decode = sum(counts[name] for name in ("PRMT", "LOP3", "SHF"))
    assert decode <= 3 * weights
    # Scaling each sum, reads and addresses come on top.
    assert len(kernel.loop) <= (4 if m <= 16 else 5) * weights
    products = (config.block_n // 64) * (config.block_k // 16)
    assert counts["HGMMA"] == products
    assert len(kernel.loop) > 2.5 * weights


# Calls that it serves.


def test_the_heuristic():
    for m in (1, 8, 9, 64, 65, 512):
        for n, k in [(64, 128), (200, 1024), (4096, 4096), (14336, 4096)]:
            config = forward.heuristic(m, n, k)
            assert config.block_m in (8, 16, 32, 64, 128)
            assert config.block_m >= min(m, 128)
            assert k % config.block_k == 0
            assert 1 <= config.split_k <= k // config.block_k
    # For few rows of W and x, the parts fill the multiprocessors.
    assert forward.heuristic(1, 4096, 4096).split_k == 8
    assert forward.heuristic(1, 14336, 4096).split_k == 2
    assert forward.heuristic(1, 128256, 4096).split_k == 1


def kernels_in(fn, *args):
    """Returns the operations that a function runs as kernels on Hopper."""
    text = lowered_for(hopper_compiler.mesh(), fn, *args)
    assert text.count("custom_call @mosaic_gpu") == len(OF_KERNEL.findall(text))
    return OF_KERNEL.findall(text)


OF_KERNEL = re.compile(r"custom_call @mosaic_gpu.*?(matmul|dequantize)_blockwise")


def test_few_rows_are_one_kernel():
    x, codes, absmax = operands(8, 192, 256, 64, jnp.bfloat16)
    assert kernels_in(matmul, x, codes, absmax) == ["matmul"]
    assert kernels_in(matmul, x[0], codes, absmax) == ["matmul"]
    assert kernels_in(matmul, x.reshape(2, 2, 2, 256), codes, absmax) == ["matmul"]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"m": 513}, {}),
        ({"m": 513}, {"transpose": False}),
        ({"k": 192}, {}),
        ({"k": 192}, {"transpose": False}),
        ({"dtype": np.float32}, {}),
        ({}, {"compute_dtype": np.float32}),
        ({"m": 0}, {}),
    ],
    ids=str,
)
def test_what_is_decoded_first(shape, options):
    shape = {
        "m": 8,
        "n": 256,
        "k": 256,
        "block_size": 64,
        "dtype": jnp.bfloat16,
    } | shape
    args = operands(**shape, transpose=options.get("transpose", True))
    fn = functools.partial(matmul, **options)
    assert kernels_in(lambda *args: fn(*args), *args) == ["dequantize"]


@pytest.mark.parametrize("name", BYTE_CODEBOOKS)
def test_8_bit_codes_are_multiplied_by_warps(name):
    """For more rows, XLA decodes linear int8 itself, in one pass."""
    run = functools.partial(matmul, name=name)

    def kernels_for(m):
        args = operands(m, 192, 128, 64, jnp.bfloat16, name=name)
        return kernels_in(lambda *args: run(*args), *args)

    assert kernels_for(128) == ["matmul"]
    assert kernels_for(129) == ([] if name == "int8" else ["dequantize"])


@pytest.mark.parametrize("block_size", [2, 16, 8192])
def test_block_sizes_that_are_not_served(block_size):
    args = operands(8, 64, 256, block_size, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"got {block_size}"):
        matmul(*args, block_size=block_size)


def test_a_bias_takes_no_kernel_of_its_own():
    """XLA adds the bias together with the parts of the columns."""
    x, codes, absmax = operands(8, 1024, 1024, 64, jnp.bfloat16)

    def kernels(fn, *args):
        program, _ = hopper_compiler.compile_for(
            hopper_compiler.mesh(), fn, *avals(*args)
        )
        entry = program.as_text().partition("ENTRY")[2]
        return re.findall(r" (fusion|custom-call|copy|add)\(", entry)

    bias = np.zeros(1024, jnp.bfloat16)
    without = kernels(matmul, x, codes, absmax)
    assert without.count("custom-call") == 1
    with_bias = kernels(lambda b, *args: matmul(*args) + b, bias, x, codes, absmax)
    assert with_bias == without


@pytest.mark.parametrize("rows", [192, 100])
def test_the_gradient_is_one_kernel_too(rows):
    args = operands(8, rows, 256, 64, jnp.bfloat16)

    def loss(x, codes, absmax):
        return jnp.sum(jnp.sin(matmul(x, codes, absmax).astype(jnp.float32)))

    assert kernels_in(jax.grad(loss), *args) == ["matmul", "matmul"]


both_ways = pytest.mark.parametrize("transpose", [True, False])


@both_ways
def test_one_matrix_of_many_x_is_not_repeated(transpose):
    # W is square, so it works both ways.
    x, codes, absmax = operands(4, 256, 256, 64, jnp.bfloat16)
    xs = np.stack([x] * 6).reshape(2, 3, 4, 256)
    one = functools.partial(matmul, transpose=transpose)
    fn = jax.vmap(jax.vmap(one, (0, None, None)), (0, None, None))
    text = lowered_for(hopper_compiler.mesh(), fn, xs, codes, absmax)
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    # Rows of x are side by side, a multiple of the tile, with one matrix.
    assert "tensor<1x32x256xbf16>" in call
    assert "tensor<1x256x128xui8>" in call


@both_ways
def test_a_stack_of_matrices_is_one_kernel(transpose):
    args = operands(4, 256, 256, 64, jnp.bfloat16, leading=(2, 3))
    fn = jax.vmap(jax.vmap(functools.partial(matmul, transpose=transpose)))
    text = lowered_for(hopper_compiler.mesh(), fn, *args)
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert "tensor<6x8x256xbf16>" in call
    assert "tensor<6x256x128xui8>" in call


@both_ways
def test_what_is_nested_is_fused_too(transpose):
    x, codes, absmax = operands(8, 256, 256, 64, jnp.bfloat16)

    def run(x, codes, absmax, *nested):
        weight = weight_of(codes, absmax, 64, nested=nested)
        return matmul_blockwise(
            x, weight, transpose=transpose, implementation="mosaic_gpu"
        )

    assert kernels_in(run, x, codes, *quantize_absmax(absmax)) == ["matmul"]


@pytest.mark.parametrize("transpose", [False, True])
def test_switched_off_the_cpu_has_the_same_numbers(transpose, monkeypatch):
    x, codes, absmax = operands(5, 256, 256, 64, np.float32, leading=(2, 3))
    nested = quantize_absmax(absmax)

    def transformed():
        # A new function, because traces are cached.
        def run(x, codes, absmax, *nested):
            weight = weight_of(codes, absmax, 64, nested=nested or None)
            return matmul_blockwise(x, weight, transpose=transpose)

        def loss(x, codes, absmax):
            return jnp.sum(jnp.sin(run(x, codes, absmax)))

        @jax.jit
        def all_of(x, codes, absmax):
            one = codes[0, 0], absmax[0, 0]
            return (
                run(x[0, 0], *one),
                run(x, *one),
                run(x[0, 0, 0], *one),
                jax.vmap(run, (0, None, None))(x[0], *one),
                jax.vmap(run, (None, 0, 0))(x[0, 0], codes[0], absmax[0]),
                jax.vmap(run)(x[:1, 0], codes[:1, 0], absmax[:1, 0]),
                jax.vmap(jax.vmap(run), (0, None, None))(x, codes[0], absmax[0]),
                jax.vmap(jax.vmap(run, (None, 0, 0)))(x[:, 0], codes, absmax),
                jax.grad(loss)(x[0, 0], *one),
                jax.vmap(jax.grad(loss))(x[0], codes[0], absmax[0]),
                run(x[0, 0], codes[0, 0], *(a[0, 0] for a in nested)),
                jax.vmap(jax.vmap(run))(x, codes, *nested),
                jax.vmap(jax.vmap(run, (0, None, None, None, None)))(
                    x, codes[:, 0], *(a[:, 0] for a in nested)
                ),
            )

        args = x, codes, absmax
        return str(jax.make_jaxpr(all_of)(*args)), all_of(*args)

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    jaxpr, expected = transformed()
    assert "choose_implementation" not in jaxpr
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    jaxpr, got = transformed()
    assert "choose_implementation" in jaxpr
    # XLA chooses the order of the same sums of up to 256 terms.
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
