"""The formats that `jaxbnb bench calibrate` studies."""

import math

import numpy as np
import pytest

from jaxbnb.benchmarks._calibrate import STUDY, study_levels
from jaxbnb_kernels.codebooks import decision_points


@pytest.mark.parametrize("name", STUDY)
def test_levels_are_the_best_for_normal_values(name):
    """Each level is the mean of the normal values that are nearest to it."""
    points, codes = decision_points(study_levels(name))
    assert len(codes) == 2 ** int(name[0])
    deviation = STUDY[name][-1]
    edges = [-math.inf, *(deviation * points.astype(np.float64)), math.inf]
    density = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in edges]
    below = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in edges]
    means = -np.diff(density) / np.diff(below)
    levels = deviation * study_levels(name)[codes]
    # The table has four digits.
    np.testing.assert_allclose(levels, means, atol=2e-4)
