"""The native CPU product, for each instruction set that this processor has.

The kernel multiplies with the same decoded and rounded numbers as the reference. So the
tolerance is that of test_matmul_blockwise.py: K products summed in float32 in any
order, and one rounding of the result.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import ISAS, alone, check_threads, library, using
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, FP4, NF4
from jaxbnb_kernels.matmul_blockwise import Weight, cpu_kernel
from jaxbnb_kernels.quantize_blockwise import quantize_absmax
from jaxbnb_kernels.quantize_blockwise.kernels import to_bytes

CODEBOOKS = {"nf4": NF4, "fp4": FP4, "dynamic8": DYNAMIC8_SIGNED, "int8": None}
pytestmark = pytest.mark.matrix

DTYPES = ["float32", "bfloat16", "float16"]

every_isa = pytest.mark.parametrize("isa", ISAS)
both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["W", "W.T"])


def random_weight(rows, size, name="nf4", block_size=64, seed=0):
    """Returns a weight of random codes, as NumPy."""
    random = np.random.default_rng(seed)
    codebook = CODEBOOKS[name]
    stored = -(-size // 2) if name.endswith("4") else size
    codes = random.integers(0, 256, (rows, stored), np.uint8)
    if codebook is None:
        codes = np.maximum(codes.view(np.int8), -127)
    absmax = np.exp(random.standard_normal((rows, -(-size // block_size))) - 3)
    return Weight(codes, absmax.astype(np.float32), None, codebook, block_size, size)


def random_x(m, weight, transpose, dtype="float32", seed=1):
    k = weight.size if transpose else weight.codes.shape[0]
    x = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    return x.astype(jnp.dtype(dtype))


def multiply(x, weight, transpose, compute_dtype=None):
    """Calls the kernel with the instruction set in use."""
    nested = ()
    if weight.nested is not None:
        nested = weight.nested[0][None, :], jnp.reshape(weight.nested[1], (1, 1))
    library()
    return _multiply(
        x,
        weight.codes,
        weight.absmax,
        *nested,
        codebook=to_bytes(weight.codebook),
        block_size=weight.block_size,
        size=weight.size,
        transpose=transpose,
        compute_dtype=np.dtype(compute_dtype or x.dtype),
    )


@functools.partial(
    jax.jit,
    static_argnames=("codebook", "block_size", "size", "transpose", "compute_dtype"),
)
def _multiply(*arrays, **options):
    (product,) = cpu_kernel.matmul(*arrays, **options)
    return product


def decode(weight, dtype):
    """Decodes the matrix in NumPy, where no program is compiled for each shape."""
    codes, absmax, codebook = weight.codes, weight.absmax, weight.codebook
    if weight.nested is not None:
        absmax = np.asarray(weight.float_absmax())
    scale = np.repeat(absmax, weight.block_size, axis=1)[:, : weight.size]
    if codebook is None:
        return (codes * (scale * np.float32(1 / 127))).astype(dtype).astype(np.float64)
    if len(codebook) == 16:
        halves = np.stack([codes >> 4, codes & 15], axis=-1)
        codes = halves.reshape(len(codes), 2 * codes.shape[1])[:, : weight.size]
    return (codebook[codes] * scale).astype(dtype).astype(np.float64)


def check(y, x, weight, transpose, compute_dtype=None):
    """Compares y with the product in float64; see the docstring of this file."""
    compute_dtype = jnp.dtype(compute_dtype or x.dtype)
    matrix = decode(weight, compute_dtype)
    matrix = matrix.T if transpose else matrix
    x64 = x.astype(compute_dtype).astype(np.float64)
    expected = x64 @ matrix
    terms = np.abs(x64) @ np.abs(matrix)
    info = jnp.finfo(y.dtype)
    rounding = 2.0 ** -(info.nmant + 1) + 2**-24
    tolerance = len(matrix) * 2**-24 * terms + rounding * np.abs(expected)
    tolerance += float(info.smallest_subnormal) + 1e-37
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y).astype(np.float64) - expected)
    assert np.all(error <= tolerance), (error / tolerance).max()


@every_isa
@both_ways
@pytest.mark.parametrize("name", ["nf4", "dynamic8", "int8"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 9, 17, 70, 530])
def test_tokens(m, name, transpose, isa):
    """Each number of tokens has tiles of its own, and each dtype other instructions."""
    weight = random_weight(150, 300, name)
    for dtype in ("float32", "bfloat16"):
        x = random_x(m, weight, transpose, dtype)
        with using(isa):
            y = multiply(x, weight, transpose)
        check(y, x, weight, transpose)


@every_isa
@both_ways
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, compute_dtype, transpose, isa):
    weight = random_weight(48, 192)
    x = random_x(9, weight, transpose, dtype)
    with using(isa):
        y = multiply(x, weight, transpose, compute_dtype)
    check(y, x, weight, transpose, compute_dtype)


@every_isa
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 40),
    rows=st.integers(0, 300),
    size=st.integers(1, 700),
    block_size=st.sampled_from([32, 64, 96, 128, 4096]),
    name=st.sampled_from(sorted(CODEBOOKS)),
    dtype=st.sampled_from(DTYPES),
    transpose=st.booleans(),
)
def test_shapes(m, rows, size, block_size, name, dtype, transpose, isa):
    weight = random_weight(rows, size, name, block_size)
    x = random_x(m, weight, transpose, dtype)
    with using(isa):
        y = multiply(x, weight, transpose)
    check(y, x, weight, transpose)


@pytest.mark.parametrize("shape", [(1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("m", [0, 1, 9])
@both_ways
def test_empty_sums_are_zero(transpose, m, shape):
    weight = random_weight(*shape)
    y = multiply(random_x(m, weight, transpose), weight, transpose)
    assert y.shape == (m, shape[0 if transpose else 1])
    assert not np.any(np.asarray(y))


@every_isa
@both_ways
@pytest.mark.parametrize("m", [1, 20])
def test_double_quantised(m, transpose, isa):
    weight = random_weight(75, 640)
    absmax, *nested = quantize_absmax(jnp.asarray(weight.absmax))
    codes, block_size, size = weight.codes, weight.block_size, weight.size
    weight = Weight(codes, absmax, tuple(nested), NF4, block_size, size)
    x = random_x(m, weight, transpose)
    with using(isa):
        y = multiply(x, weight, transpose)
    check(y, x, weight, transpose)


@both_ways
def test_matrices_and_what_they_share(transpose):
    weights = [random_weight(40, 128, seed=seed) for seed in range(3)]
    codes, absmax = (
        np.stack([getattr(w, name) for w in weights]) for name in ("codes", "absmax")
    )
    x = np.stack([random_x(5, weights[0], transpose, seed=seed) for seed in range(3)])
    library()
    options = {
        "codebook": NF4.tobytes(),
        "block_size": 64,
        "size": 128,
        "transpose": transpose,
        "compute_dtype": np.dtype(np.float32),
    }
    each = _multiply(x, codes, absmax, **options)
    shared = _multiply(x, codes[:1], absmax[:1], **options)
    for i, weight in enumerate(weights):
        check(each[i], x[i], weight, transpose)
        check(shared[i], x[i], weights[0], transpose)


@every_isa
@both_ways
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("m", [3, 21])
def test_unaligned_matrices(m, name, transpose, isa):
    """Matrices of odd sizes begin anywhere in memory, except for the first."""
    weights = [random_weight(7, 33, name, 32, seed) for seed in range(3)]
    codes, absmax = (
        np.stack([getattr(w, part) for w in weights]) for part in ("codes", "absmax")
    )
    for dtype in ("float32", "bfloat16"):
        x = np.stack(
            [random_x(m, w, transpose, dtype, 4 + i) for i, w in enumerate(weights)]
        )
        with using(isa):
            together = _multiply(
                x,
                codes,
                absmax,
                codebook=to_bytes(CODEBOOKS[name]),
                block_size=32,
                size=33,
                transpose=transpose,
                compute_dtype=np.dtype(x.dtype),
            )
        for y, *arrays in zip(together, x, weights, strict=True):
            check(y, *arrays, transpose)


@every_isa
@both_ways
@pytest.mark.parametrize("m", [4, 37])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_tokens_stay_in_their_rows(value, m, transpose, isa):
    weight = random_weight(90, 200)
    for dtype in ("float32", "bfloat16"):
        clean = random_x(m, weight, transpose, dtype)
        x = clean.copy()
        x[1, 3] = value
        with using(isa):
            y = np.array(multiply(x, weight, transpose)).astype(np.float32)
            expected = np.array(multiply(clean, weight, transpose)).astype(np.float32)
        assert not np.isfinite(y[1]).any()
        y[1] = expected[1]
        np.testing.assert_array_equal(y, expected)


@every_isa
@both_ways
@pytest.mark.parametrize("m", [1, 37])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_absmax_stay_in_their_rows_of_w(value, m, transpose, isa):
    weight = random_weight(90, 200)
    weight.absmax[7, 1] = value
    for dtype in ("float32", "bfloat16"):
        x = random_x(m, weight, transpose, dtype)
        with using(isa):
            y = np.array(multiply(x, weight, transpose)).astype(np.float32)
        is_finite = np.isfinite(y).all(axis=0)
        touched = slice(7, 8) if transpose else slice(64, 128)
        assert not is_finite[touched].any()
        is_finite[touched] = True
        assert is_finite.all()


def digest_of_results():
    """A digest of products of each kind, with this process's threads."""
    digest = hashlib.sha256()
    weight = random_weight(500, 704)
    for transpose in (False, True):
        for dtype in ("float32", "bfloat16"):
            for m in (1, 4, 30, 100):
                x = random_x(m, weight, transpose, dtype)
                digest.update(np.asarray(multiply(x, weight, transpose)).tobytes())
    return digest.hexdigest()


@alone
def test_numbers_do_not_depend_on_threads():
    check_threads("test_cpu_matmul", digest_of_results())
