"""The native codecs for CPUs: bit for bit what the specification computes.

The tests call the kernels through XLA, for each instruction set of this processor.
"""

import functools
import hashlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import alone, check_threads, library, using

from jaxbnb_kernels import codebooks, native
from jaxbnb_kernels.codebooks import decision_points
from jaxbnb_kernels.embed_blockwise import cpu_kernel as embed_kernel
from jaxbnb_kernels.embed_blockwise import embed_blockwise
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import (
    cpu_kernel,
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from jaxbnb_kernels.quantize_blockwise.kernels import to_bytes

NAMES = ["NF4", "FP4", "INT4", "DYNAMIC4_SIGNED", "DYNAMIC4_UNSIGNED"]
NAMES += ["DYNAMIC8_SIGNED", "DYNAMIC8_UNSIGNED", "FP8_E4M3", "FP8_E5M2"]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# Whole and ragged blocks and groups of vectors, odd rows, and nothing at all.
SHAPES = [((5, 256), 64), ((3, 1001), 64), ((2, 131), 50), ((7, 1), 64)]
SHAPES += [((4100,), 4096), ((33,), 2), ((0, 64), 64), ((3, 0), 64)]
every_codebook = pytest.mark.parametrize("name", NAMES)
# Linear int8 has no codebook.
FORMATS = [*NAMES, "LINEAR8"]
every_format = pytest.mark.parametrize("name", FORMATS)
pytestmark = pytest.mark.matrix

ISAS = ["neon"] if platform.machine() == "aarch64" else ["avx2", "avx512"]
every_isa = pytest.mark.parametrize("isa", ISAS)


def levels_of(name):
    return None if name == "LINEAR8" else getattr(codebooks, name)


@functools.partial(jax.jit, static_argnames=("name", "block_size"))
def encode(x, name, block_size):
    codebook = to_bytes(levels_of(name))
    return cpu_kernel.quantize(x, codebook=codebook, block_size=block_size)


@functools.partial(jax.jit, static_argnames=("name", "block_size", "size", "dtype"))
def decode(codes, absmax, *nested, name, block_size, size, dtype):
    options = {"block_size": block_size, "size": size, "dtype": np.dtype(dtype)}
    codebook = to_bytes(levels_of(name))
    (decoded,) = cpu_kernel.dequantize(
        codes, absmax, *nested, codebook=codebook, **options
    )
    return decoded


def extremes(shape, dtype, seed=0):
    """Draws numbers of many magnitudes, with zeros, denormals and others in between."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((*shape[:-1], 1)))
    x = x.astype(np.float32)
    flat = x.reshape(-1)
    special = [0.0, -0.0, 1e-40, -1e-40, 1e-38, 3e38, np.inf, -np.inf, np.nan, -np.nan]
    for i, value in enumerate(special):
        if flat.size > 90 * i:
            flat[90 * i] = value
    flat[128:192] = 0
    flat[192:256] *= np.float32(1e-38)
    return jnp.asarray(x).astype(dtype)


def assert_same(got, want):
    """Bit for bit, except that any NaN is as good as another one."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if got.dtype.kind not in "iu":
        got, want = got.astype(np.float32), want.astype(np.float32)
        assert np.array_equal(np.isnan(got), np.isnan(want))
        got, want = np.nan_to_num(got), np.nan_to_num(want)
        assert np.array_equal(np.signbit(got), np.signbit(want))
    assert np.array_equal(got, want)


@every_isa
@every_format
def test_codecs_are_the_specification(name, isa):
    codebook = levels_of(name)
    first = 3 * FORMATS.index(name)
    combinations = [
        (*SHAPES[(first + i) % len(SHAPES)], DTYPES[i]) for i in range(len(DTYPES))
    ]
    with using(isa):
        for shape, block_size, dtype in combinations:
            x = extremes(shape, dtype)
            want = jax.jit(
                lambda x, block_size=block_size: quantize_blockwise(
                    x, codebook, block_size=block_size, implementation="reference"
                )
            )(x)
            for got_array, want_array in zip(
                encode(x, name, block_size), want, strict=True
            ):
                assert_same(got_array, want_array)
            options = {"block_size": block_size, "size": shape[-1], "dtype": dtype}
            got = decode(*want, name=name, **options)
            decoded = jax.jit(
                lambda codes, absmax, options=options: dequantize_blockwise(
                    codes, absmax, codebook, **options, implementation="reference"
                )
            )(*want)
            assert_same(got, decoded)


@every_isa
@every_codebook
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_number_of_16_bits(name, dtype, isa):
    """All numbers up to one, in blocks that begin with one."""
    bits = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN, on Arm
        numbers = bits.astype(np.float32)
    # XLA and its threads take denormals for zero.
    is_used = (np.abs(numbers) <= 1) & ((numbers == 0) | (np.abs(numbers) > 2e-38))
    if "UNSIGNED" in name:
        is_used &= numbers >= 0
    used = bits[is_used]
    used = np.pad(used, (0, -len(used) % 63))
    used = used.reshape(-1, 63)
    blocks = np.concatenate([np.ones((len(used), 1), dtype), used], axis=1)
    points, codes = decision_points(getattr(codebooks, name))
    want = codes[np.searchsorted(points, blocks.astype(np.float32), side="left")]
    if len(getattr(codebooks, name)) == 16:
        want = want[:, ::2] << 4 | want[:, 1::2]
    with using(isa):
        got, absmax = encode(jnp.asarray(blocks), name, 64)
    assert (np.asarray(absmax) == 1).all()
    assert np.array_equal(got, want)


@every_isa
@every_codebook
def test_ties_and_their_neighbours(name, isa):
    points, codes = decision_points(getattr(codebooks, name))
    around = [np.nextafter(points, -2), points, np.nextafter(points, 2)]
    x = np.stack(around, axis=-1).reshape(-1).astype(np.float32)
    x = np.append(x, np.float32(1))
    want = codes[np.searchsorted(points, x, side="left")].astype(np.uint8)
    if len(getattr(codebooks, name)) == 16:
        filled = np.append(want, codes[np.searchsorted(points, 0)])
        filled = filled[: len(x) + len(x) % 2]
        want = (filled[::2] << 4 | filled[1::2]).astype(np.uint8)
    with using(isa):
        got, _ = encode(jnp.asarray(x), name, 2 * len(x))
    assert np.array_equal(got, want)


@every_isa
@pytest.mark.parametrize("shape", [(3, 200), (2, 5, 4100), (2, 0, 64)])
def test_nested_absmax(shape, isa):
    x = jax.random.normal(jax.random.key(0), shape)
    codes, absmax = quantize_blockwise(x, codebooks.NF4, block_size=64)
    absmax, *nested = quantize_absmax(absmax)
    options = {"block_size": 64, "size": shape[-1], "dtype": jnp.float32}
    want = dequantize_blockwise(
        codes,
        absmax,
        codebooks.NF4,
        nested=tuple(nested),
        implementation="reference",
        **options,
    )
    with using(isa):
        got = decode(codes, absmax, *nested, name="NF4", **options)
    # XLA may round the product and the sum of the absmax once.
    np.testing.assert_allclose(got, want, rtol=2.0**-22)


@every_isa
@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_looked_up(name, dtype, isa):
    codebook = levels_of(name)
    x = jax.random.uniform(jax.random.key(0), (50, 192))
    codes, absmax = encode_by_reference(x, codebook)
    weight = Weight(codes, absmax, None, codebook, block_size=64, size=192)
    ids = jnp.array([0, 49, 7, 7, 31])
    want = embed_blockwise(ids, weight, dtype=dtype, implementation="reference")
    with using(isa):
        (got,) = embed_kernel.embed(
            ids,
            absmax[ids],
            codes,
            codebook=to_bytes(codebook),
            block_size=64,
            dtype=np.dtype(dtype),
        )
    assert_same(got, want)


def encode_by_reference(x, codebook):
    return quantize_blockwise(x, codebook, block_size=64, implementation="reference")


def test_unaligned_rows():
    """A row of an odd number of bytes puts the next one anywhere."""
    x = jax.random.normal(jax.random.key(0), (64, 1, 77))
    with using(native.instruction_set() or "none"):
        together = encode(x, "NF4", 64)
        alone = [encode(row, "NF4", 64) for row in x]
    for i, results in enumerate(zip(*alone, strict=True)):
        assert np.array_equal(together[i], np.stack(results))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["NF4", "LINEAR8"])
def test_more_elements_than_32_bits_number(name):
    """Rows repeat, but not after a power of two of elements. Needs 7 GB."""
    library()
    size, period = 4096, 1009
    rows = 2**31 // size + period
    # A scale for each row, so that no two of a period are equal.
    pattern = jax.random.normal(jax.random.key(0), (period, size), jnp.bfloat16)
    pattern *= 1 + jnp.arange(period, dtype=jnp.bfloat16)[:, None] / 64
    options = {"name": name, "block_size": 64}
    decode_all = functools.partial(decode, size=size, dtype=jnp.bfloat16, **options)
    want_encoded = encode(pattern, **options)
    want = np.asarray(decode_all(*want_encoded))
    x = jax.jit(lambda pattern: pattern[jnp.arange(rows) % period])(pattern)
    assert x.size > 2**31
    encoded = encode(x, **options)
    del x
    decoded = decode_all(*encoded)
    for got, expected in zip((*encoded, decoded), (*want_encoded, want), strict=True):
        got, expected = np.asarray(got), np.asarray(expected)
        for first in range(0, rows, period):
            part = got[first : first + period]
            assert np.array_equal(part, expected[: len(part)]), first


def digest_of_results():
    """A digest of codes, absmax and decoded numbers, with this process's threads."""
    library()
    x = jax.random.normal(jax.random.key(0), (257, 4096))
    codes, absmax = encode(x, "NF4", 64)
    options = {"block_size": 64, "size": 4096, "dtype": jnp.bfloat16}
    decoded = decode(codes, absmax, name="NF4", **options)
    digest = hashlib.sha256()
    for array in (codes, absmax, decoded):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


@alone
def test_numbers_do_not_depend_on_threads():
    check_threads("test_cpu_codecs", digest_of_results())
