"""A pseudorandom order of rows that is never written down."""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 8


def shuffled(
    positions: Int64[np.ndarray, " n"], count: int, *key: int
) -> Int64[np.ndarray, " n"]:
    """Returns which of ``count`` rows stand at these positions of a shuffled order.

    A Feistel network permutes the numbers below a power of four. Numbers outside the
    range are permuted again until they fall into it. So any part of the order takes
    memory for itself only, and the order is the same with every version of NumPy.

    Args:
        positions: positions in the order, each at least 0 and less than ``count``.
        count: number of rows.
        *key: integers that choose the order.

    Example:
        >>> shuffled(np.arange(6), 6, 0).tolist()
        [5, 4, 3, 0, 1, 2]
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _mix(_combine(key) + np.arange(_ROUNDS, dtype=np.uint64))
    found = positions.astype(np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return found.astype(np.int64)


def _combine(key: tuple[int, ...]) -> UInt64[np.ndarray, ""]:
    combined = np.zeros((), np.uint64)
    for part in key:
        combined = _mix(combined ^ np.uint64(part))
    return combined


def _mix(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Scrambles bits, as the finaliser of SplitMix64 does."""
    # Zero-dimensional arrays become scalars, and NumPy warns when those overflow.
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
