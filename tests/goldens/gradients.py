"""Gradients for the optimizer goldens, from a formula instead of a file.

Only raw PCG64 words, integer arithmetic and correctly rounded float32 operations are
used, so every platform and every NumPy version gets the same bits.
"""

import math

import numpy as np

SHAPE = (32, 512)
STEPS = 50

#: In these rows the second moments underflow to code 0, and the first moments do not.
UNDERFLOW_ROWS = slice(7, None, 8)

DECADES = np.array([1.0, 1e-1, 1e-2, 1e-3, 1e-4], np.float32)


def near_normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Draw nearly normal float32 values with a standard deviation of 1.15.

    Each is the centred sum of the four 16-bit parts of one 64-bit word, over 2**15.
    This is exact in float32.
    """
    words = np.random.PCG64(seed).random_raw(math.prod(shape)).reshape(shape)
    parts = [(words >> np.uint64(s)) & np.uint64(0xFFFF) for s in (0, 16, 32, 48)]
    total = np.sum(parts, axis=0, dtype=np.int64) - 2 * 0xFFFF
    return total.astype(np.float32) / np.float32(2**15)


def away_from_zero(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Draw like `near_normal`, and move each value a quarter away from zero."""
    normal = near_normal(seed, shape)
    return normal + np.copysign(np.float32(0.25), normal)


def initial(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return the parameter before the first step."""
    return near_normal(0, shape)


def gradient(step: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Return the float32 gradient of a step; steps count from 1.

    A shape with fewer rows and the same columns gets the first rows of `SHAPE`.

    Row i is scaled by 10**-(i % 4) and column j by 10**-(j % 3), and values keep a
    quarter away from zero, so that no second moment underflows. In `UNDERFLOW_ROWS`
    column j is scaled by 10**-(j % 5) instead, and values may come arbitrarily near to
    zero. There bitsandbytes divides by eps alone, and some parameters jump.

    In each step, an eighth of the elements is exactly zero. Columns 5, 69, 133, ...
    and the whole second block of row 3 are zero in every step.
    """
    row, column = np.indices(shape, sparse=True)
    scaled = away_from_zero(step, shape) * DECADES[row % 4] * DECADES[column % 3]
    wide = near_normal(step, shape) * DECADES[column % 5]
    scaled[UNDERFLOW_ROWS] = wide[UNDERFLOW_ROWS]

    zero = (7 * row + 3 * column + step) % 8 == 0
    zero |= column % 64 == 5
    zero |= (row == 3) & (column >= 256)
    return np.where(zero, np.float32(0), scaled)
