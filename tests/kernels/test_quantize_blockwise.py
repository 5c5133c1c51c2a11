"""The contract of quantize_blockwise and dequantize_blockwise.

Every implementation is compared with a float64 NumPy oracle, in every format. The
contract is not that codes equal the oracle's, but that the chosen level is the nearest,
up to the rounding of x / absmax.
"""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unsupported import or_skip

from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    NF4,
    decision_points,
)
from jaxbnb_kernels.quantize_blockwise import (
    IMPLEMENTATIONS,
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)

FORMATS = {
    "nf4": NF4,
    "fp4": FP4,
    "int4": INT4,
    "int8": None,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# How far a decision may be from the true mid-point, relative to x / absmax. A table
# rounds the reciprocal, the product and the mid-point. The arithmetic of the dynamic
# maps documents its own bound.
DECISION_ERROR = dict.fromkeys(FORMATS, 3 * 2**-24) | {
    "dynamic8": 2**-20,
    "dynamic8_unsigned": 2**-20,
}


def has_hopper_gpu():
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


# XLA flushes values below float32's normal range to zero.
TINY = float(np.finfo(np.float32).tiny)

# Without its GPU, mosaic_gpu is emulated: test_mosaic_gpu.py.
RUNNABLE = [
    name for name in IMPLEMENTATIONS if name != "mosaic_gpu" or has_hopper_gpu()
]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
every_format = pytest.mark.parametrize("name", FORMATS)
# FP4 takes NF4's paths, and the unsigned map the signed one's. These are enough where
# each case compiles anew.
every_kind = pytest.mark.parametrize("name", ["nf4", "int8", "dynamic8"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


@functools.cache
def compiled_quantize(name, implementation, block_size):
    return jax.jit(
        lambda x: quantize_blockwise(
            x, FORMATS[name], block_size=block_size, implementation=implementation
        )
    )


@functools.cache
def compiled_dequantize(name, implementation, block_size, size, dtype):
    return jax.jit(
        lambda codes, absmax: dequantize_blockwise(
            codes,
            absmax,
            FORMATS[name],
            block_size=block_size,
            size=size,
            dtype=dtype,
            implementation=implementation,
        )
    )


def levels_of(name):
    """Returns each code's level in float64; int8's codes are their own indices."""
    codebook = FORMATS[name]
    if codebook is None:
        return np.arange(-127, 128) / 127.0
    return codebook.astype(np.float64)


def unpack(codes, name, size):
    """Returns indices into `levels_of(name)`, one for each element."""
    codes = np.asarray(codes)
    if name == "int8":
        assert codes.dtype == np.int8
        return codes.astype(np.int64) + 127
    assert codes.dtype == np.uint8
    if len(FORMATS[name]) == 16:
        codes = np.stack([codes >> 4, codes & 15], axis=-1)
        codes = codes.reshape(*codes.shape[:-2], 2 * codes.shape[-2])[..., :size]
    return codes.astype(np.int64)


def per_element(absmax, block_size, size):
    return np.repeat(absmax, block_size, axis=-1)[..., :size]


def oracle_absmax(x, block_size):
    """Returns max(abs(x)) of each block, or NaN if an element is NaN."""
    blocks = -(-x.shape[-1] // block_size)
    filled = np.zeros((*x.shape[:-1], blocks * block_size), np.float64)
    filled[..., : x.shape[-1]] = np.abs(x.astype(np.float64))
    return filled.reshape(*x.shape[:-1], blocks, block_size).max(axis=-1)


def check_codes(x, codes, absmax, name, block_size):
    """Checks the encoder's contract, for finite x."""
    size = x.shape[-1]
    expected = oracle_absmax(x, block_size)
    # An absmax below the normal range may be flushed.
    np.testing.assert_allclose(absmax, expected, rtol=0, atol=TINY)
    is_normal = expected >= TINY
    np.testing.assert_array_equal(absmax[is_normal], expected[is_normal])

    indices = unpack(codes, name, size)
    levels = levels_of(name)
    assert indices.shape == x.shape
    assert indices.min(initial=0) >= 0
    assert indices.max(initial=0) < len(levels)
    exact = x.astype(np.float64)
    np.testing.assert_array_equal(levels[indices[exact == 0]], 0.0)

    scale = per_element(np.where(is_normal, expected, 1.0), block_size, size)
    scaled = exact / scale
    # INT4's -8 is never the nearest level, nor are FP8's infinities and NaN.
    reachable = np.unique(levels[np.abs(levels) <= 1])
    midpoints = (reachable[:-1] + reachable[1:]) / 2
    nearest = reachable[np.searchsorted(midpoints, scaled)]
    # If a decision is off by d, the chosen level is at most 2 d farther than the best.
    excess = np.abs(levels[indices] - scaled) - np.abs(nearest - scaled)
    allowed = 2 * DECISION_ERROR[name] * np.abs(scaled)
    assert np.all(excess <= allowed), (excess - allowed).max()


def check_decoded(decoded, codes, absmax, name, block_size, dtype):
    """Checks the decoder: level times absmax in float32, rounded once more."""
    size = decoded.shape[-1]
    assert decoded.dtype == dtype
    levels = levels_of(name)[unpack(codes, name, size)]
    expected = levels * per_element(absmax.astype(np.float64), block_size, size)
    # int8 divides the absmax by 127 first, which is another rounding.
    roundings = 2 if name == "int8" else 1
    precision = jnp.finfo(dtype).nmant + 1
    relative = roundings * 2**-24 + 2.0**-precision
    smallest = max(TINY, float(jnp.finfo(dtype).smallest_subnormal))
    decoded = np.asarray(decoded, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(decoded[~finite], expected[~finite])
    decoded, expected = decoded[finite], expected[finite]
    error = np.abs(decoded - expected)
    assert np.all(error <= relative * np.abs(expected) + smallest)


def normal(shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x.astype(dtype)


@or_skip
def round_trip(x, name, implementation, block_size):
    """Returns codes, absmax and the decoded array, as NumPy."""
    codes, absmax = compiled_quantize(name, implementation, block_size)(x)
    decode = compiled_dequantize(
        name, implementation, block_size, x.shape[-1], np.dtype(x.dtype)
    )
    decoded = decode(codes, absmax)
    assert absmax.dtype == np.float32
    return np.asarray(codes), np.asarray(absmax), np.asarray(decoded)


def check(x, name, implementation, block_size):
    if name == "dynamic8_unsigned":
        x = np.abs(x)
    check_results(x, *round_trip(x, name, implementation, block_size), name, block_size)


def check_results(x, codes, absmax, decoded, name, block_size):
    packed = FORMATS[name] is not None and len(FORMATS[name]) == 16
    stored = -(-x.shape[-1] // 2) if packed else x.shape[-1]
    assert codes.shape == (*x.shape[:-1], stored)
    assert absmax.shape == (*x.shape[:-1], -(-x.shape[-1] // block_size))
    check_codes(x, codes, absmax, name, block_size)
    check_decoded(decoded, codes, absmax, name, block_size, x.dtype)


def with_one(value, dtype):
    x = normal(150, dtype=dtype)
    x[70] = value
    return x


# 150 elements in blocks of 64 make two whole blocks and a ragged one of 22.
FINITE = {
    "random": lambda dtype: normal(150, dtype=dtype),
    "spread over decades": lambda dtype: (
        normal(150) * np.exp(4 * normal(150, seed=1))
    ).astype(dtype),
    "zeros": lambda dtype: np.zeros(150, dtype),
    "negative zeros": lambda dtype: -np.zeros(150, dtype),
    "one block of zeros": lambda dtype: (
        normal(150) * (np.arange(150) // 64 != 1)
    ).astype(dtype),
    "one value": lambda dtype: np.full(150, -0.3).astype(dtype),
    "subnormal": lambda dtype: (
        normal(150) * float(jnp.finfo(dtype).smallest_subnormal) * 9
    ).astype(dtype),
    "smallest normal": lambda dtype: (
        np.sign(normal(150)) * float(jnp.finfo(dtype).tiny)
    ).astype(dtype),
    "one huge": lambda dtype: with_one(jnp.finfo(dtype).max, dtype),
    "all huge": lambda dtype: (
        np.clip(normal(150), -1, 1) * float(jnp.finfo(dtype).max)
    ).astype(dtype),
    "3e38 or the largest float16": lambda dtype: np.full(
        150, min(3e38, float(jnp.finfo(dtype).max)), dtype
    ),
}


@every_implementation
@every_format
@every_dtype
def test_finite(dtype, name, implementation):
    x = np.stack([make(dtype) for make in FINITE.values()])
    x = np.abs(x) if name == "dynamic8_unsigned" else x
    results = round_trip(x, name, implementation, block_size=64)
    for case, *row in zip(FINITE, x, *results, strict=True):
        print(case)  # Shown where its check fails.
        check_results(*row, name, block_size=64)


@every_implementation
@every_format
@every_dtype
def test_non_finite_stays_so_and_spoils_its_block_only(dtype, name, implementation):
    """Rows of one each; in the last row, zeros are in their place."""
    x = np.stack([with_one(value, dtype) for value in (np.nan, np.inf, -np.inf, 0)])
    x = np.abs(x) if name == "dynamic8_unsigned" else x
    spoiled = np.arange(150) // 64 == 1
    x[-1, spoiled] = 0
    codes, absmax, decoded = round_trip(x, name, implementation, block_size=64)
    assert np.isfinite(absmax).tolist() == [[True, False, True]] * 3 + [[True] * 3]
    assert not np.any(np.isfinite(decoded[:3, spoiled].astype(np.float32)))
    for got in (unpack(codes, name, 150)[:, ~spoiled], decoded[:, ~spoiled]):
        np.testing.assert_array_equal(got, np.broadcast_to(got[-1], got.shape))


@every_implementation
@every_kind
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.matrix
def test_a_nan_among_many_blocks(block_size, name, implementation):
    """It may be anywhere in its block: XLA reduces large arrays differently."""
    blocks = 1024
    x = np.array(normal((blocks, block_size)))
    place = np.arange(blocks) % (2 * block_size)
    bad = place < block_size
    x[np.flatnonzero(bad), place[bad]] = np.nan
    _, absmax, decoded = round_trip(jnp.asarray(x), name, implementation, block_size)
    np.testing.assert_array_equal(np.isnan(absmax[:, 0]), bad)
    assert np.all(np.isnan(decoded[bad]))
    assert np.all(np.isfinite(decoded[~bad]))


@every_implementation
@every_kind
@pytest.mark.parametrize("block_size", [2, 6, 256, 4096])
@pytest.mark.matrix
def test_block_sizes(block_size, name, implementation):
    # 300 is shorter than the largest block, and a multiple of only 2 and 6.
    check(normal((3, 300)), name, implementation, block_size)


@every_implementation
@every_kind
@pytest.mark.parametrize(
    "shape", [(0,), (3, 0), (0, 64), (1,), (2, 3, 65), (2, 1, 2, 5)], ids=str
)
@pytest.mark.matrix
def test_shapes(shape, name, implementation):
    check(normal(shape), name, implementation, block_size=64)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    name=st.sampled_from(list(FORMATS)),
    implementation=st.sampled_from(RUNNABLE),
    shape=st.lists(st.integers(0, 5), max_size=2),
    size=st.integers(0, 200),
    half_block=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.matrix
def test_any_shape_and_block_size(name, implementation, shape, size, half_block, seed):
    check(normal((*shape, size), seed), name, implementation, 2 * half_block)


@every_implementation
@every_format
def test_ties_go_to_the_lower_level(name, implementation):
    """Tests exact mid-points and their float32 neighbours, in blocks of absmax 1."""
    codebook = FORMATS[name]
    if codebook is None:
        pytest.skip("(k + 1/2) / 127 is no float32: int8 has no exact ties")
    points, code_of = decision_points(codebook)
    around = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.stack([points, *around]).astype(np.float32)
    x = np.concatenate([x, np.ones((3, 1), np.float32)], axis=1)
    codes, _, _ = round_trip(x, name, implementation, block_size=256)
    expected = code_of[np.searchsorted(points, x, side="left")]
    indices = unpack(codes, name, x.shape[-1])
    if DECISION_ERROR[name] < 2**-23 or implementation == "reference":
        np.testing.assert_array_equal(indices, expected)
    # Arithmetic may choose either neighbour.
    assert np.all(np.abs(indices - expected) <= (len(codebook) == 256))


@every_format
@every_dtype
@pytest.mark.matrix
def test_implementations_agree(name, dtype):
    """They agree on random values, and code for code if a table decides."""
    x = normal((64, 384), dtype=dtype)
    x = np.abs(x) if name == "dynamic8_unsigned" else x
    expected = round_trip(x, name, "reference", 64)
    indices = unpack(expected[0], name, 384)
    for implementation in RUNNABLE:
        codes, absmax, decoded = round_trip(x, name, implementation, 64)
        np.testing.assert_array_equal(absmax, expected[1])
        differ = unpack(codes, name, 384) != indices
        # Within 2^-20 of 255 mid-points lies a share of at most 2^-12 of the elements,
        # unless a 16-bit dtype bunches them: 6 of 24,576, and 16 is 4 sigma.
        assert differ.sum() <= (0 if DECISION_ERROR[name] < 2**-23 else 16)
        np.testing.assert_array_equal(decoded[~differ], expected[2][~differ])


# mean(abs(error)) and root mean square of 2^18 draws of N(0, 1) (their magnitudes, if
# unsigned). Blocks are 64, or 256 for the dynamic maps, as in practice.
MEASURED = {
    "nf4": (0.07285, 0.09200),
    "fp4": (0.09674, 0.12217),
    "int4": (0.09175, 0.10810),
    "int8": (0.00506, 0.00597),
    "dynamic8": (0.00856, 0.01086),
    "dynamic8_unsigned": (0.00428, 0.00544),
    "fp8_e4m3": (0.01711, 0.02505),
    "fp8_e5m2": (0.03421, 0.05010),
}


@every_implementation
@every_format
@pytest.mark.matrix
def test_measured_error(name, implementation):
    x = normal((256, 1024))
    x = np.abs(x) if name == "dynamic8_unsigned" else x
    block_size = 256 if "dynamic8" in name else 64
    _, _, decoded = round_trip(x, name, implementation, block_size)
    error = np.abs(decoded.astype(np.float64) - x)
    measured = round(error.mean(), 5), round(math.sqrt((error**2).mean()), 5)
    assert measured == MEASURED[name]


@every_implementation
@every_format
@pytest.mark.matrix
def test_decoding_every_code(name, implementation):
    codebook = FORMATS[name]
    if codebook is None:
        codes = np.arange(-127, 128).astype(np.int8)[None]
    else:
        # Every 8-bit code, or every pair of 4-bit codes.
        codes = np.arange(256).astype(np.uint8)[None]
    size = unpack(codes, name, 512).shape[-1]
    absmax = np.array([[0.37]], np.float32)
    decode = compiled_dequantize(name, implementation, 512, size, np.dtype(np.float32))
    decoded = np.asarray(or_skip(decode)(codes, absmax))
    check_decoded(decoded, codes, absmax, name, 512, np.float32)


@every_implementation
@every_format
@pytest.mark.matrix
def test_a_quantised_array_decodes_and_encodes_to_itself(name, implementation):
    """Each block contains its absmax, so quantising again does not change it."""
    x = normal((8, 256))
    # The dynamic map lacks -1, so the largest must be positive.
    x = np.abs(x) if "dynamic8" in name else x
    codes, absmax, decoded = round_trip(x, name, implementation, 64)
    again, absmax_again, _ = round_trip(decoded, name, implementation, 64)
    if name != "int8":
        # int8's 127 x (absmax / 127) may be off from absmax by one rounding.
        np.testing.assert_array_equal(absmax_again, absmax)
    np.testing.assert_array_equal(unpack(again, name, 256), unpack(codes, name, 256))


@every_implementation
@every_kind
@pytest.mark.matrix
def test_transforms(name, implementation):
    """vmap and scan give the same as all rows at once."""
    x = np.abs(normal((4, 150)))
    codes, absmax, decoded = round_trip(x, name, implementation, 64)

    def both(row):
        codes, absmax = quantize_blockwise(
            row, FORMATS[name], block_size=64, implementation=implementation
        )
        return (
            codes,
            absmax,
            dequantize_blockwise(
                codes,
                absmax,
                FORMATS[name],
                block_size=64,
                size=150,
                implementation=implementation,
            ),
        )

    mapped = jax.jit(jax.vmap(both))(x)
    scanned = jax.lax.scan(lambda _, row: (None, both(row)), None, x)[1]
    for run in (mapped, scanned):
        for got, want in zip(run, (codes, absmax, decoded), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.matrix
def test_errors_of_quantize():
    x = jnp.ones((2, 64))
    with pytest.raises(TypeError, match=r"needs a floating dtype, got int32.*astype"):
        quantize_blockwise(jnp.ones(4, jnp.int32), NF4, block_size=64)
    with pytest.raises(ValueError, match="at least one axis; got a scalar"):
        quantize_blockwise(jnp.float32(1), NF4, block_size=64)
    for block_size in (0, -2, 3):
        with pytest.raises(ValueError, match=f"even number; got {block_size}"):
            quantize_blockwise(x, NF4, block_size=block_size)
    with pytest.raises(ValueError, match="16 or 256 levels; got 4"):
        quantize_blockwise(x, NF4[:4], block_size=64)
    with pytest.raises(ValueError, match=r"no implementation 'cuda'; choose one of"):
        quantize_blockwise(x, NF4, block_size=64, implementation="cuda")


@pytest.mark.matrix
def test_errors_of_dequantize():
    codes, absmax = quantize_blockwise(jnp.ones((2, 128)), NF4, block_size=64)
    with pytest.raises(
        ValueError,
        match=r"130 elements in blocks of 64 have codes \(2, 65\) and absmax \(2, 3\); "
        r"got \(2, 64\) and \(2, 2\)",
    ):
        dequantize_blockwise(codes, absmax, NF4, block_size=64, size=130)
    with pytest.raises(ValueError, match="even number; got 5"):
        dequantize_blockwise(codes, absmax, NF4, block_size=5, size=128)
    with pytest.raises(ValueError, match="16 or 256 levels; got 15"):
        dequantize_blockwise(codes, absmax, NF4[:15], block_size=64, size=128)
    absmax, nested_absmax, offset = quantize_absmax(absmax)
    nested = nested_absmax, offset[None]
    with pytest.raises(TypeError, match=r"where it is nested, .* uint8 with nested=N"):
        dequantize_blockwise(codes, absmax, NF4, block_size=64, size=128)
    with pytest.raises(
        ValueError,
        match=r"\(2, 2\) have nested_absmax \(1,\) and offset \(\); got \(1,\), \(1,\)",
    ):
        dequantize_blockwise(codes, absmax, NF4, block_size=64, size=128, nested=nested)


@pytest.mark.matrix
def test_another_codebook_of_256_levels():
    """It lacks an arithmetic form: the specification serves it, xla declines."""
    levels = np.linspace(-1, 1, 256).astype(np.float32)
    x = jnp.asarray(normal(64))
    with pytest.raises(
        NotImplementedError, match="no 8-bit codebook except the dynamic"
    ):
        quantize_blockwise(x, levels, block_size=64, implementation="xla")
    codes, absmax = quantize_blockwise(x, levels, block_size=64)
    decoded = dequantize_blockwise(codes, absmax, levels, block_size=64, size=64)
    # The bound is half a step of 2 / 255, and a rounding.
    assert np.max(np.abs(decoded - x)) <= absmax[0] * (1 / 255 + 1e-6)


@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
@pytest.mark.matrix
def test_every_nan_of_an_absmax_stays_nan(bits, dtype, implementation):
    absmax = np.array([bits], np.uint32).view(np.float32)
    decoded = dequantize_blockwise(
        np.arange(32, dtype=np.uint8),
        absmax,
        NF4,
        block_size=64,
        size=64,
        dtype=dtype,
        implementation=implementation,
    )
    assert np.all(np.isnan(np.asarray(decoded, np.float32)))


@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.matrix
def test_the_gradient_of_an_absmax_is_the_sum_of_its_levels(dtype, implementation):
    def total(absmax):
        decoded = dequantize_blockwise(
            np.full(32, 0x8F, np.uint8),
            absmax,
            NF4,
            block_size=64,
            size=64,
            dtype=dtype,
            implementation=implementation,
        )
        return jnp.sum(decoded.astype(jnp.float32))

    # The sum has two levels, each 32 times: NF4[8] and NF4[15] = 1.
    expected = 32 * (np.float64(NF4[8]) + 1)
    # Each of 64 products is rounded once, and so are the sums.
    tolerance = 2.0**-8 if dtype == "bfloat16" else 2.0**-18
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(1)), [expected], rtol=tolerance)
