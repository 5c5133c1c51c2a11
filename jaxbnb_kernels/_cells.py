"""The nearest code by one look-up, in cells that hold at most one decision point.

A float's leading bits, which are its exponent and some of its mantissa, number cells
that grow with the magnitude, as the distances between levels do. The cells are so small
that none holds two decision points of the codebook. So a value's cell and one
comparison decide its code exactly, without a search or rounding.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxbnb_kernels.codebooks import decision_points

MANTISSA_BITS = 23
# An entry packs two codes: the one above the point is shifted left by this.
ABOVE_SHIFT = 8
# A cell takes 8 bytes; six tables share a multiprocessor's 228 KiB of fast memory.
MOST_CELLS = 4096


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells that numbers up to 1 are divided into, for one codebook.

    Attributes:
        lowest: power of two; smaller magnitudes share its cell.
        shift: how far a float's bits are shifted right to number its cell.
        is_signed: whether as many cells of negative values follow the others. If not,
            negative values are in the lowest cell.
    """

    lowest: float
    shift: int
    is_signed: bool

    @property
    def first(self) -> int:
        """The shifted bits that cells are counted from."""
        return int(np.float32(self.lowest).view(np.int32)) >> self.shift

    @property
    def per_sign(self) -> int:
        """The number of cells of each sign; 1 itself is in the last."""
        return (int(np.float32(1).view(np.int32)) >> self.shift) - self.first + 1

    @property
    def values(self) -> np.ndarray:
        """A value in each cell."""
        bits = (np.arange(self.per_sign, dtype=np.int32) + self.first) << self.shift
        values = bits.view(np.float32)
        return np.concatenate([values, -values]) if self.is_signed else values


@functools.lru_cache(16)
def of_codebook(
    codebook: bytes, keep_positive: bool = False
) -> tuple[Cells, np.ndarray]:
    """Returns the coarsest cells that separate decision points, and their table.

    Args:
        codebook: bytes of the float32 levels.
        keep_positive: whether only zero gets the code of zero. The levels must start
            at zero.

    Returns:
        ``(cells, table)``. The table is int32 ``(number of cells, 2)``: for each cell
        the bits of its decision point, or of infinity if it has none, and two codes:
        the one up to that point ``| the one above << ABOVE_SHIFT``.

    Raises:
        NotImplementedError: the codebook has a decision point at zero, or points so
            close together that they need more than ``MOST_CELLS`` cells.
    """
    levels = np.frombuffer(codebook, np.float32)
    points, codes = decision_points(levels)
    magnitudes = np.abs(points)
    if not magnitudes.min() > 0:
        raise NotImplementedError(
            "a codebook's decision points must lie above or below zero, not at zero"
        )
    lowest = float(2.0 ** np.floor(np.log2(magnitudes.min())))
    if keep_positive:
        points[0] = 0.0
    cells, at = _coarsest(points, lowest, bool(np.any(levels < 0)))
    # All values in a cell without a point have the same code.
    below = codes[np.searchsorted(points, cells.values, side="left")]
    above = below.copy()
    thresholds = np.full(below.shape, np.inf, np.float32)
    thresholds[at], below[at], above[at] = points, codes[:-1], codes[1:]
    packed = (below | above << ABOVE_SHIFT).astype(np.int32)
    return cells, np.stack([thresholds.view(np.int32), packed], axis=-1)


def _coarsest(
    points: np.ndarray, lowest: float, is_signed: bool
) -> tuple[Cells, np.ndarray]:
    """Returns the cells, and the number of the cell that each point lies in."""
    for bits in range(MANTISSA_BITS + 1):
        cells = Cells(lowest, MANTISSA_BITS - bits, is_signed)
        if len(cells.values) > MOST_CELLS:
            break
        at = cell_of(points, cells)
        if len(np.unique(at)) == len(at):
            return cells, at
    raise NotImplementedError(f"the codebook needs more than {MOST_CELLS} cells")


def cell_of(x: Any, cells: Cells) -> Any:
    """Returns the number of each value's cell; a NaN is in the lowest.

    Args:
        x: float32 array of NumPy or JAX, no larger than 1. Tables come from NumPy,
            because a program may be lowered where JAX cannot compute on any device.
        cells: cells of the codebook.

    Returns:
        int32 in the shape of ``x``, from the same library.
    """
    numpy: Any = np if isinstance(x, np.ndarray) else jnp
    lowest = np.float32(cells.lowest)
    magnitude = abs(x) if cells.is_signed else x
    # Unlike a maximum, this drops a NaN.
    magnitude = numpy.where(magnitude > lowest, magnitude, lowest)
    cell = (magnitude.view(np.int32) >> cells.shift) - cells.first
    if not cells.is_signed:
        return cell
    return cell + numpy.where(
        x.view(np.int32) < 0, np.int32(cells.per_sign), np.int32(0)
    )


def encode(
    x: Float32[Array, "*shape"], cells: Cells, table: Int32[Array, "cells 2"]
) -> Int32[Array, "*shape"]:
    """Encodes each ``x`` to the nearest level; a tie goes to the lower one."""
    entry = table[cell_of(x, cells)]
    point = jax.lax.bitcast_convert_type(entry[..., 0], jnp.float32)
    codes = jnp.where(x > point, entry[..., 1] >> ABOVE_SHIFT, entry[..., 1])
    return codes & (2**ABOVE_SHIFT - 1)
