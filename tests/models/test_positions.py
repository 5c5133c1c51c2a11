"""Positions without rope, against transformers' formulas in NumPy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxbnb.models._positions import find_slopes, make_waves, slope_positions


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (7, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3, 2**-5]),
    ],
)
def test_slopes(heads, slopes):
    np.testing.assert_allclose(find_slopes(heads), slopes, rtol=1e-15)


def test_slopes_in_bfloat16():
    """Slope, position and product are rounded, each once."""
    positions = np.array([[0, 3, 255, 257, 258, 1999]])
    got = slope_positions(jnp.asarray(positions), 32, is_rounded=True)
    slopes = find_slopes(32).astype(np.float32).astype(ml_dtypes.bfloat16)
    product = slopes[:, None] * positions[:, None].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, product.astype(np.float32))
    exact = slope_positions(jnp.asarray(positions), 32)
    assert 0.5 < np.abs(got - exact).max() < 1999 * 2**-7


def test_waves():
    positions = np.array([[0, 1, 5, 2000]])
    got = make_waves(jnp.asarray(positions), 6)
    angles = positions[..., None] * 10_000.0 ** -np.array([0, 0.5, 1])
    want = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    # A frequency has an error of 2^-24, and the largest angle is 2000.
    np.testing.assert_allclose(got, want, rtol=0, atol=2000 * 2**-24)
