"""Double quantisation: 8-bit absmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import library

from jaxbnb_kernels import quantize_blockwise as op
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, NF4
from jaxbnb_kernels.quantize_blockwise import NESTED_BLOCK_SIZE, quantize_blockwise

# Compiled, because op by op they take ten times as long.
quantize_absmax = jax.jit(op.quantize_absmax)
dequantize_absmax = jax.jit(op.dequantize_absmax)


# The map's cells are widest in its last decade, at 0.9 / 64.
HALF_A_CELL = 0.45 / 64


def absmax_of(shape, seed=0):
    """Returns maxima of 64 normal draws, as a weight has them."""
    draws = np.random.default_rng(seed).standard_normal((*shape, 64))
    return np.abs(draws).max(axis=-1).astype(np.float32)


def test_it_is_the_mean_and_the_signed_map_of_what_remains():
    absmax = absmax_of((24, 31))
    codes, nested_absmax, offset = quantize_absmax(jnp.asarray(absmax))
    # A float32 mean in any order has 744 additions of 2^-24.
    np.testing.assert_allclose(offset, absmax.mean(dtype=np.float64), rtol=744 * 2**-24)
    rest = (jnp.asarray(absmax) - offset).reshape(-1)
    expected = quantize_blockwise(rest, DYNAMIC8_SIGNED, block_size=NESTED_BLOCK_SIZE)
    # Eager and compiled code may round the difference differently.
    np.testing.assert_allclose(nested_absmax, expected[1], rtol=2**-22)
    steps = np.abs(codes.reshape(-1).astype(int) - expected[0].astype(int))
    assert steps.max() <= 1
    assert steps.sum() <= 1


@pytest.mark.parametrize(
    "shape", [(5,), (256,), (1, 1), (24, 31), (3, 40, 9), (2, 2, 3, 300)], ids=str
)
def test_round_trip(shape):
    absmax = absmax_of(shape)
    codes, nested_absmax, offset = quantize_absmax(jnp.asarray(absmax))
    batch = shape[:-2]
    elements = int(np.prod(shape[len(batch) :]))
    assert (codes.shape, codes.dtype) == (shape, jnp.uint8)
    assert nested_absmax.shape == (*batch, -(-elements // NESTED_BLOCK_SIZE))
    assert offset.shape == batch
    assert nested_absmax.dtype == offset.dtype == jnp.float32
    decoded = dequantize_absmax(codes, nested_absmax, offset)
    assert (decoded.shape, decoded.dtype) == (shape, jnp.float32)
    # The error is within a cell, plus the roundings of the sum and the difference. The
    # map lacks a level -1: its lower end is 0.0070 from the lowest level, half a cell.
    largest = np.asarray(nested_absmax).max()
    tolerance = HALF_A_CELL * largest * 1.001 + 3 * 2**-24 * absmax.max()
    np.testing.assert_allclose(decoded, absmax, rtol=0, atol=tolerance)


def test_each_matrix_of_a_stack_is_on_its_own():
    absmax = absmax_of((3, 8, 10)) * np.array([1, 100, 0.01], np.float32)[:, None, None]
    stacked = quantize_absmax(jnp.asarray(absmax))
    decoded = dequantize_absmax(*stacked)
    for i in range(3):
        alone = dequantize_absmax(*quantize_absmax(jnp.asarray(absmax[i])))
        # Their means may sum in another order, which hardly ever changes a code.
        np.testing.assert_allclose(decoded[i], alone, rtol=80 * 2**-24)


def test_equal_absmax_are_exact():
    absmax = jnp.full((4, 8), 0.5)
    codes, nested_absmax, offset = quantize_absmax(absmax)
    assert offset == 0.5
    np.testing.assert_array_equal(nested_absmax, 0.0)
    decoded = dequantize_absmax(codes, nested_absmax, offset)
    np.testing.assert_array_equal(decoded, absmax)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 2, 2), (2, 0, 2)], ids=str)
def test_empty(shape):
    codes, nested_absmax, offset = quantize_absmax(jnp.zeros(shape))
    assert codes.shape == shape
    assert dequantize_absmax(codes, nested_absmax, offset).shape == shape


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_non_finite_absmax_never_become_finite(value):
    absmax = jnp.ones((4, 100)).at[2, 7].set(value)
    decoded = dequantize_absmax(*quantize_absmax(absmax))
    assert not np.any(np.isfinite(decoded))


def test_finite_absmax_stay_finite():
    """The sum of two 3e38 overflows float32; their mean does not."""
    absmax = jnp.full((2, 2), 3e38)
    decoded = dequantize_absmax(*quantize_absmax(absmax))
    np.testing.assert_allclose(decoded, absmax, rtol=1e-6)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_transforms(transform):
    def round_trip(absmax):
        return op.dequantize_absmax(*op.quantize_absmax(absmax))

    absmax = jnp.asarray(absmax_of((3, 8, 10)))
    decoded = transform(round_trip)(absmax)
    plain = round_trip(absmax)
    np.testing.assert_allclose(decoded, plain, rtol=80 * 2**-24)


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_gpu", "cpu"])
def test_a_decoder_takes_what_is_nested(implementation):
    """It decodes matrices and vectors, mapped or not, and differentiated."""
    # Without a GPU, the default is the kernel's stand-in.
    chosen = None if implementation == "mosaic_gpu" else implementation
    if implementation == "cpu":
        library()
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (3, 24, 11 * 16)).astype(np.uint8)
    exact = jnp.asarray(absmax_of((3, 24, 11)))

    def decode(codes, absmax, *nested):
        return op.dequantize_blockwise(
            codes,
            absmax,
            NF4,
            block_size=32,
            size=11 * 32,
            nested=nested or None,
            implementation=chosen,
        )

    def check(decoded, absmax):
        # The absmax are a product plus an offset, rounded once or twice.
        expected = decode(codes, absmax)
        np.testing.assert_allclose(decoded, expected, rtol=2**-21)

    of_matrices = quantize_absmax(exact)
    check(decode(codes, *of_matrices), dequantize_absmax(*of_matrices))
    check(jax.vmap(decode)(codes, *of_matrices), dequantize_absmax(*of_matrices))
    of_rows = jax.vmap(jax.vmap(op.quantize_absmax))(exact)
    by_row = jax.vmap(jax.vmap(op.dequantize_absmax))(*of_rows)
    check(jax.vmap(jax.vmap(decode))(codes, *of_rows), by_row)

    def total(offset):
        return jnp.sum(decode(codes[0], of_matrices[0][0], nested_absmax, offset))

    nested_absmax = of_matrices[1][0]
    pairs = np.stack([codes[0] >> 4, codes[0] & 15])
    # These are sums of 8,448 levels, in any order.
    np.testing.assert_allclose(
        jax.grad(total)(of_matrices[2][0]),
        NF4[pairs].sum(dtype=np.float64),
        atol=8448 * 2**-24 * np.abs(NF4[pairs]).sum(),
    )
