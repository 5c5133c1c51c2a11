"""Second moments as the solver takes them: damped, in order, and factored.

In NumPy's float64, because the inverse of a moment may lose all digits of float32.
"""

from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

# Share of the mean of the diagonal that is added to it.
DAMPING: Final = 0.01
# Most outputs that make up for each other's errors. The moments of an 8B model's tiles
# take 2.6 GiB, and 55 GiB if each matrix is one tile.
_MOST: Final = 512
# Outputs that are rounded at once. Then the rest of their tile makes up for them.
GROUP: Final = 32
# Share of the correlation of gradients that counts. Two moments overstate what outputs
# can do for each other, because inputs and gradients of a token depend on each other.
_CORRELATION: Final = 0.5


def damping_of(moment: Float64[np.ndarray, "n n"]) -> float:
    """Returns what is added to the diagonal of a moment."""
    mean = np.trace(moment) / max(len(moment), 1)
    # Without any input, all columns are alike.
    return float(DAMPING * mean) if mean > 0 else 1.0


def prepare_inputs(
    moment: Float64[np.ndarray, "n n"], block_size: int
) -> tuple[
    Float64[np.ndarray, "m m"], Int[np.ndarray, " m"], Float64[np.ndarray, "m m"]
]:
    """Damps a moment, and returns it with the order of its columns and its factor.

    The last block is filled up to ``m`` columns that no input reaches.

    Returns:
        The damped moment, in the order; the order; and its `_factor`.
    """
    size = len(moment)
    short = -size % block_size
    damped = np.pad(moment, (0, short)) + damping_of(moment) * np.eye(size + short)
    diagonal = np.diagonal(damped).reshape(-1, block_size)
    blocks = np.argsort(-diagonal.sum(1), kind="stable")
    inside = np.argsort(-diagonal, axis=1, kind="stable")
    order = (blocks[:, None] * block_size + inside[blocks]).reshape(-1)
    damped = damped[np.ix_(order, order)]
    return damped, order, _factor(damped)


class Outputs(NamedTuple):
    """What the outputs of each tile can do for each other.

    Attributes:
        tiles: second moments of the gradients.
        order: numbers of a tile's outputs, in the order in which they are rounded.
        shares: how far the errors of a group of outputs change those after it, in that
            order; 0 for all others.
    """

    tiles: Float32[Array, "tiles t t"]
    order: Int[Array, "tiles t"]
    shares: Float32[Array, "tiles t t"]


def prepare_outputs(tiles: Float64[np.ndarray, "tiles t t"]) -> Outputs:
    """Orders the outputs of each tile, and finds what they do for each other."""
    order = np.argsort(-np.diagonal(tiles, axis1=1, axis2=2), axis=1, kind="stable")
    in_order = np.take_along_axis(tiles, order[:, :, None], axis=1)
    in_order = np.take_along_axis(in_order, order[:, None], axis=2)
    factor, shares = _factor(in_order), np.zeros_like(tiles)
    for first in range(0, tiles.shape[-1], GROUP):
        group, after = slice(first, first + GROUP), slice(first + GROUP, None)
        shares[:, group, after] = np.linalg.solve(
            factor[:, group, group], factor[:, group, after]
        )
    return Outputs(
        jnp.asarray(tiles, jnp.float32),
        jnp.asarray(order),
        jnp.asarray(shares, jnp.float32),
    )


def _factor(moment: Float64[np.ndarray, "*lead n n"]) -> np.ndarray:
    """Returns the upper triangular ``U`` with ``U^T U`` the inverse of a moment."""
    # With H = R R^T and R upper triangular, the inverse of R is U. Reversed, R is the
    # lower factor that NumPy computes.
    reverse = moment[..., ::-1, ::-1]
    try:
        upper = np.linalg.cholesky(reverse)[..., ::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the moment is not positive semi-definite, or not finite"
        ) from error
    return np.triu(np.linalg.inv(upper))


def tile_shape(fan_out: int) -> tuple[int, int, int]:
    """Returns the shape of the tiles of a layer's outputs.

    A tile has at most 512 outputs, and a multiple of 32.

    Example:
        >>> tile_shape(576), tile_shape(1024), tile_shape(10)
        ((2, 288, 288), (2, 512, 512), (1, 32, 32))
    """
    fewest = max(1, -(-fan_out // _MOST))
    tile = max(1, -(-fan_out // (fewest * GROUP))) * GROUP
    return max(1, -(-fan_out // tile)), tile, tile


def shrink_tiles(
    gradients: Float[Array, "tiles t t"] | np.ndarray, fan_out: int
) -> Float64[np.ndarray, "tiles t t"]:
    """Returns the moments that `minimize_error` uses in place of ``gradients``.

    Example:
        >>> shrink_tiles(np.array([[[1.0, 0.5], [0.5, 3.0]]]), 2).tolist()
        [[[1.02, 0.25], [0.25, 3.02]]]
    """
    moments = np.asarray(gradients, np.float64)
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    mean = diagonal.sum() / max(fan_out, 1)
    shrunk = _CORRELATION * moments
    index = np.arange(moments.shape[-1])
    # Without any gradient, all outputs are alike.
    shrunk[:, index, index] = diagonal + (DAMPING * mean if mean > 0 else 1.0)
    return shrunk
