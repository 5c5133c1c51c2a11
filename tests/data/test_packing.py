"""Best fit, and the order of rows, as pure functions."""

import itertools

import numpy as np
import pytest

from jaxbnb.data._packing import pack_lengths, piece_lengths
from jaxbnb.data._shuffle import shuffled


@pytest.mark.parametrize("seed", range(3))
def test_best_fit(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 200).tolist()
    windows = pack_lengths(lengths, 32)
    assert sorted(itertools.chain(*windows)) == list(range(200))
    sizes = sorted(sum(lengths[i] for i in window) for window in windows)
    assert sizes[-1] <= 32
    # The second of two that fit together would have gone into the first.
    assert sizes[0] + sizes[1] > 32
    assert pack_lengths(lengths, 32) == windows


def test_pieces_cover_a_text():
    for length, window in itertools.product(range(1, 20), range(2, 8)):
        pieces = piece_lengths(length, window)
        assert sum(pieces) - (len(pieces) - 1) == length
        assert max(pieces) <= window
        # A piece of one token would have nothing to predict.
        assert min(pieces) >= min(2, length)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000])
def test_an_order_has_each_row_once(count):
    everything = np.arange(count)
    order = shuffled(everything, count, 7, 0)
    np.testing.assert_array_equal(np.sort(order), everything)
    # A part of it is the same as the whole's.
    part = everything[count // 3 : count // 2]
    np.testing.assert_array_equal(shuffled(part, count, 7, 0), order[part])


def test_an_order_is_random():
    """1,000 orders of 4: each row is first 250 times, give or take 5 sigma."""
    counts = np.zeros((4, 4), int)
    for seed in range(1000):
        counts[np.arange(4), shuffled(np.arange(4), 4, seed)] += 1
    sigma = np.sqrt(1000 * 1 / 4 * 3 / 4)
    assert (abs(counts - 250) < 5 * sigma).all()
