"""The nearest code by one look-up: cells of the float32 numbers, a decision in each.

A float's leading bits, its exponent and some of its mantissa, number cells that grow
with the magnitude, as the distances between levels do. They are made so small that no
cell holds two decision points of the codebook. Then its cell and one comparison decide
a value's code, exactly: no search, and no rounding.
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
# A code above the point is kept this far left of the one below it.
ABOVE_SHIFT = 8
# A cell takes 8 bytes; six tables share a multiprocessor's 228 KiB of fast memory.
MOST_CELLS = 4096


@dataclasses.dataclass(frozen=True)
class Cells:
    """The division of the numbers up to 1 into cells, for one codebook.

    Attributes:
        lowest: a power of two; smaller magnitudes share its cell.
        shift: number of bits to shift a float's bits right, to number its cell.
        is_signed: whether as many cells of negative values follow the others; if not,
            those are in the lowest.
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
        """How many cells each sign has; 1 itself is in the last."""
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
    """The coarsest cells that part the decision points of a codebook, and their table.

    Args:
        codebook: the bytes of its float32 levels.
        keep_positive: whether only zero gets the code of zero. The levels must start
            at zero.

    Returns:
        ``(cells, table)``: of each cell, int32 ``(number of cells, 2)``: the bits of
        the decision point in it, infinity where there is none, and its codes:
        the one not above that point ``| the one above << ABOVE_SHIFT``.

    Raises:
        NotImplementedError: the codebook has a decision point at zero, or some so
            close that there would be more than ``MOST_CELLS`` cells.
    """
    levels = np.frombuffer(codebook, np.float32)
    points, codes = decision_points(levels)
    magnitudes = np.abs(points)
    if not magnitudes.min() > 0:
        raise NotImplementedError("cells divide codebooks by magnitude, not at zero")
    lowest = float(2.0 ** np.floor(np.log2(magnitudes.min())))
    if keep_positive:
        points[0] = 0.0
    cells, at = _coarsest(points, lowest, bool(np.any(levels < 0)))
    # Without a point in it, all of a cell has the code of any value there.
    below = codes[np.searchsorted(points, cells.values, side="left")]
    above = below.copy()
    thresholds = np.full(below.shape, np.inf, np.float32)
    thresholds[at], below[at], above[at] = points, codes[:-1], codes[1:]
    packed = (below | above << ABOVE_SHIFT).astype(np.int32)
    return cells, np.stack([thresholds.view(np.int32), packed], axis=-1)


def _coarsest(
    points: np.ndarray, lowest: float, is_signed: bool
) -> tuple[Cells, np.ndarray]:
    """The cells, and in which of them each point lies."""
    for bits in range(MANTISSA_BITS + 1):
        cells = Cells(lowest, MANTISSA_BITS - bits, is_signed)
        if len(cells.values) > MOST_CELLS:
            break
        at = cell_of(points, cells)
        if len(np.unique(at)) == len(at):
            return cells, at
    raise NotImplementedError(f"the codebook needs more than {MOST_CELLS} cells")


def cell_of(x: Any, cells: Cells) -> Any:
    """The number of the cell of each ``x`` up to 1; a NaN is in the lowest.

    Args:
        x: float32, of NumPy or JAX. Tables are computed by NumPy, since a program may
            be lowered where no device of JAX can compute anything.
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
    """The code of the level nearest to each ``x``; a tie goes to the lower level."""
    entry = table[cell_of(x, cells)]
    point = jax.lax.bitcast_convert_type(entry[..., 0], jnp.float32)
    codes = jnp.where(x > point, entry[..., 1] >> ABOVE_SHIFT, entry[..., 1])
    return codes & (2**ABOVE_SHIFT - 1)
