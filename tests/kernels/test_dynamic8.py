"""The dynamic 8-bit codes by arithmetic, against the mid-points of the map.

The documented bound: if the chosen level is not the nearest, the value is within a
relative 2^-20 of the mid-point between the two.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb_kernels import _dynamic8
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED

BOUND = 2.0**-20

either_sign = pytest.mark.parametrize(
    "signed", [True, False], ids=["signed", "unsigned"]
)


def codebook_of(signed):
    return DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED


def encode(x, signed):
    codes = jax.jit(lambda x: _dynamic8.encode(x, signed=signed))(jnp.asarray(x))
    assert codes.dtype == jnp.uint8
    return np.asarray(codes).astype(np.int64)


def check(x, codes, signed):
    """Checks the codes of a float32 x; the mid-points are exact in float64."""
    levels = codebook_of(signed).astype(np.float64)
    midpoints = (levels[:-1] + levels[1:]) / 2
    exact = x.astype(np.float64)
    nearest = np.searchsorted(midpoints, exact, side="left")
    other = codes != nearest
    assert np.all(np.abs(codes - nearest) <= 1)
    crossed = midpoints[np.minimum(codes, nearest)[other]]
    distance = np.abs(exact[other] - crossed) / np.abs(crossed)
    assert np.all(distance <= BOUND), distance.max()


@either_sign
def test_every_decision_point_and_its_neighbours(signed):
    levels = codebook_of(signed)
    points = (levels[:-1] + levels[1:]) / np.float32(2)
    # A float32's magnitude grows with its integer bits.
    bits = points.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    x = bits.view(np.float32)
    check(x, encode(x, signed), signed)


@either_sign
def test_beyond_the_bound_the_choice_is_the_nearest(signed):
    levels = codebook_of(signed)
    points = ((levels[:-1] + levels[1:]) / np.float32(2)).astype(np.float64)
    below = (points - 1.1 * BOUND * np.abs(points)).astype(np.float32)
    above = (points + 1.1 * BOUND * np.abs(points)).astype(np.float32)
    np.testing.assert_array_equal(encode(below, signed), np.arange(255))
    np.testing.assert_array_equal(encode(above, signed), np.arange(1, 256))


@either_sign
def test_every_level_is_its_own_code(signed):
    np.testing.assert_array_equal(encode(codebook_of(signed), signed), np.arange(256))


@either_sign
def test_a_million_values_over_ten_decades(signed):
    generator = np.random.default_rng(0)
    x = 10.0 ** generator.uniform(-10, 0, 2**20)
    if signed:
        x *= generator.choice([-1, 1], x.shape)
    x = x.astype(np.float32)
    check(x, encode(x, signed), signed)


@either_sign
def test_codes_grow_with_the_value(signed):
    x = np.sort(np.random.default_rng(1).uniform(-1 if signed else 0, 1, 2**20))
    assert np.all(np.diff(encode(x.astype(np.float32), signed)) >= 0)


@either_sign
def test_the_ends_and_zero(signed):
    x = np.array([-1, -0.0, 0.0, 1e-30, 1], np.float32)
    x = x if signed else x[1:]
    zero = 127 if signed else 0
    expected = [0, zero, zero, zero, 255] if signed else [zero, zero, zero, 255]
    assert encode(x, signed).tolist() == expected


@either_sign
def test_eager_and_compiled_agree(signed):
    """XLA may fuse product and sum in one of them, which stays within the bound."""
    levels = codebook_of(signed)
    x = (levels[:-1] + levels[1:]) / np.float32(2)
    eager = np.asarray(_dynamic8.encode(jnp.asarray(x), signed=signed)).astype(np.int64)
    check(x, eager, signed)
