"""The codebooks, rebuilt from their definitions."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

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

ALL = {
    "nf4": NF4,
    "fp4": FP4,
    "int4": INT4,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
}


def test_nf4_is_quantiles_of_the_normal_distribution():
    quantile = statistics.NormalDist().inv_cdf
    # There is one more level above zero than below it, so that zero is a level. The
    # outermost probability is the mean of 1 - 1/32 and 1 - 1/30.
    outer = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [quantile(p) for p in np.linspace(outer, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outer, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative]) / max(positive)
    # The published table has 0.9677083 for 0.96770833...: off by 4e-8. This moves the
    # quantile by 4e-8 / density(1.85) = 6e-7, and the ratio by a third of that.
    np.testing.assert_allclose(NF4, levels, rtol=0, atol=3e-7)
    assert NF4[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


def fp4_value(code: int) -> Fraction:
    """Decodes sign, two exponent bits and a mantissa bit, over the largest magnitude.

    Upstream's exponents are not monotonic: 10 and 11 stand for 2^2 and 2^1.
    """
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    if exponent == 0:
        magnitude = Fraction(mantissa, 16)
    else:
        power = {1: 8, 2: 4, 3: 2}[exponent]
        magnitude = power * (1 + Fraction(mantissa, 2))
    return (-1) ** sign * magnitude / 12


def test_fp4_is_its_bit_patterns():
    expected = np.array([float(fp4_value(code)) for code in range(16)], np.float32)
    np.testing.assert_array_equal(FP4, expected)


def test_int4_is_linear():
    assert np.array_equal(
        INT4, [np.float32(float(Fraction(i, 7))) for i in range(-8, 8)]
    )
    assert 0 not in decision_points(INT4)[1]


def fp8_value(code: int, exponent_bits: int, ieee: bool) -> float:
    """Decodes one of OCP's formats; e5m2 has IEEE's infinities."""
    mantissa_bits = 7 - exponent_bits
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    sign = -1.0 if code & 128 else 1.0
    if exponent == 2**exponent_bits - 1:
        if ieee:
            return sign * math.inf if mantissa == 0 else math.nan
        if mantissa == 2**mantissa_bits - 1:
            return math.nan
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    return sign * fraction * 2.0 ** (max(exponent, 1) - bias)


@pytest.mark.parametrize(
    ("codebook", "exponent_bits", "largest"),
    [(FP8_E4M3, 4, 448.0), (FP8_E5M2, 5, 57344.0)],
    ids=["e4m3", "e5m2"],
)
def test_fp8_is_its_bit_patterns(codebook, exponent_bits, largest):
    values = [fp8_value(code, exponent_bits, largest > 448) for code in range(256)]
    np.testing.assert_array_equal(
        codebook, (np.array(values) / largest).astype(np.float32)
    )
    assert np.nanmax(codebook[np.isfinite(codebook)]) == 1.0
    _, codes = decision_points(codebook)
    # All except one of the two zeros, and values that are not finite.
    assert len(codes) == 256 - 1 - np.sum(~np.isfinite(codebook))


def dynamic_levels(signed: bool) -> np.ndarray:
    """Builds seven decades in float64: mid-points of 2^i or 2^(i+1) cells."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [*middles, *-middles] if signed else [*middles]
    return np.sort(levels)


@pytest.mark.parametrize(
    ("codebook", "signed"), [(DYNAMIC8_SIGNED, True), (DYNAMIC8_UNSIGNED, False)]
)
def test_dynamic_maps(codebook, signed):
    expected = dynamic_levels(signed).astype(np.float32)
    # Upstream computes in float32 throughout and rounds an edge, a mean and a product,
    # so it is off by up to 2 ulp. tests/goldens compares level for level.
    np.testing.assert_array_max_ulp(codebook, expected, maxulp=2)
    assert codebook[127 if signed else 0] == 0.0
    assert codebook[255] == 1.0
    np.testing.assert_allclose(codebook[0], -0.99297 if signed else 0.0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_codebook_is_a_read_only_float32_constant(name):
    codebook = ALL[name]
    assert codebook.dtype == np.float32
    assert codebook.shape in [(16,), (256,)]
    assert 1.0 in codebook
    with pytest.raises(ValueError, match="read-only"):
        codebook[0] = 0.0


@pytest.mark.parametrize("name", ALL)
def test_decision_points_lie_halfway_between_neighbours(name):
    codebook = ALL[name]
    points, codes = decision_points(codebook)
    levels = codebook[codes].astype(np.float64)
    assert np.all(np.diff(levels) > 0)
    reachable = codebook[np.abs(codebook) <= 1]
    assert set(np.unique(reachable)) == set(codebook[codes])
    # The mean of two float32 is rounded once.
    halfway = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    np.testing.assert_array_equal(points, halfway)
    assert points.dtype == np.float32


def test_levels_beyond_1_are_not_chosen():
    points, codes = decision_points(np.array([0, 2, np.nan, 1, np.inf], np.float32))
    assert (points.tolist(), codes.tolist()) == ([0.5], [0, 3])


def test_the_two_zeros_of_fp4_count_once():
    points, codes = decision_points(FP4)
    assert len(points) == 14
    assert 0 in codes
    assert 8 not in codes
