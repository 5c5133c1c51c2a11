"""How wrong a result is, by NumPy on the host, in units of the largest allowed error.

1 passes, and NaN does not.
"""

from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

# The encoders promise the nearest level for a value at most 2^-20 from x / absmax, so
# twice that in distance.
_ENCODED: Final = 2 * 2.0**-20
# Each operation of a step: approximate quotients and roots are off by 2^-22.
STEPPED: Final = 2.0**-19


def worst_code(
    x: Float[np.ndarray, "rows n"],
    codes: Integer[np.ndarray, "rows stored"],
    absmax: Float32[np.ndarray, "rows blocks"],
    codebook: Float32[np.ndarray, "levels"] | None,
    block_size: int,
) -> float:
    """How much farther from x a level is than the nearest one, and how wrong absmax is.

    Codes themselves are not compared: near a decision point both neighbours are as
    good. n is a multiple of ``block_size``.
    """
    blocks = np.asarray(x, np.float64).reshape(len(x), -1, block_size)
    largest = np.max(np.abs(blocks), axis=-1)
    if not np.array_equal(absmax, largest, equal_nan=True):
        return np.inf
    # An element that is not finite has no code; a block of zeros has no scale.
    is_zero, is_finite = absmax == 0, np.isfinite(absmax)
    scale = np.where(is_zero | ~is_finite, 1, largest)[..., None]
    scaled = np.where(is_finite[..., None], blocks, 0) / scale
    levels = levels_of(codes, codebook, x.shape[-1]).reshape(blocks.shape)
    levels = np.where(is_finite[..., None], levels, 0)
    farther = np.abs(levels - scaled) - np.abs(nearest(scaled, codebook) - scaled)
    return float(np.max(farther)) / _ENCODED


def worst_level(
    decoded: Float[np.ndarray, "rows n"],
    codes: Integer[np.ndarray, "rows stored"],
    absmax: Float32[np.ndarray, "rows blocks"],
    codebook: Float32[np.ndarray, "levels"] | None,
    block_size: int,
    slack: Float[np.ndarray, "rows blocks"] | float = 0.0,
) -> float:
    """How wrong decoded elements are: level times absmax.

    Args:
        decoded: result to check.
        codes: codes that it was decoded from.
        absmax: one per block.
        codebook: levels of the codes; None for linear int8.
        block_size: elements that share one absmax.
        slack: error that each absmax may have. Without any, elements must be float32's
            product, rounded once more to their dtype.
    """
    levels = levels_of(codes, codebook, decoded.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        expected = levels.astype(np.float32) * spread(absmax, block_size)
        expected = np.asarray(expected.astype(decoded.dtype), np.float64)
    if np.all(slack == 0):
        is_same = np.array_equal(decoded, expected, equal_nan=True)
        return 0.0 if is_same else np.inf
    allowed = np.abs(levels) * spread(np.asarray(slack), block_size)
    allowed += 2 * unit_roundoff(decoded.dtype) * np.abs(expected)
    error = np.asarray(decoded, np.float64) - expected
    error[np.isnan(decoded) & np.isnan(expected)] = 0
    return worst(error, allowed)


def levels_of(
    codes: np.ndarray, codebook: np.ndarray | None, size: int
) -> Float[np.ndarray, "*batch size"]:
    """The level of each code: an element divided by its block's absmax."""
    if codebook is None:
        return codes / 127.0
    if len(codebook) == 16:
        pairs = np.stack([codes >> 4, codes & 15], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1)[..., :size]
    return codebook[codes]


def nearest(scaled: np.ndarray, codebook: np.ndarray | None) -> np.ndarray:
    """The level nearest to each element in [-1, 1]."""
    if codebook is None:
        return np.rint(127 * scaled) / 127
    levels = np.unique(codebook[np.abs(codebook) <= 1]).astype(np.float64)
    return levels[np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled)]


def spread(per_block: np.ndarray, block_size: int) -> np.ndarray:
    """Repeats a value per block for each element of the block."""
    return per_block.repeat(block_size, axis=-1)


def unit_roundoff(dtype: Any) -> float:
    """Half the distance from 1 to the next number of a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def inexact(result: Array, exact: np.ndarray) -> float:
    """0 where each element is the exact number rounded to the dtype; else infinite."""
    return 0.0 if np.array_equal(result, exact.astype(result.dtype)) else np.inf


def worst(error: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error in units of what is allowed for its element."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(error == 0, 0, np.abs(error) / allowed)))
