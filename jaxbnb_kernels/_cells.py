"""The nearest code by one look-up: cells of the float32 numbers, a decision in each.

A float's leading bits, its exponent and some of its mantissa, number cells that grow
with the magnitude, as the distances between levels do. They are made so small that no
cell holds two decision points of the codebook. Then its cell and one comparison decide
a value's code, exactly: no search, and no rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxbnb_kernels.codebooks import decision_points

MANTISSA_BITS = 23
# A code above the point is kept this far left of the one below it.
ABOVE_SHIFT = 8


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of [-1, 1], or of [0, 1] and all that is below; for one codebook.

    Attributes:
        lowest: a power of two; smaller magnitudes share its cell.
        shift: of a float's bits, to its cell's number.
        per_sign: how many cells there are of non-negative values.
        is_signed: whether as many follow, of negative ones.
        points: the decision point in each cell; infinity where there is none.
        codes: what is not above it ``| above << ABOVE_SHIFT``.
    """

    lowest: float
    shift: int
    per_sign: int
    is_signed: bool
    points: np.ndarray
    codes: np.ndarray

    @property
    def first(self) -> int:
        """What a cell's number counts from."""
        return int(np.float32(self.lowest).view(np.int32)) >> self.shift


@functools.lru_cache(16)
def cells_of(codebook: bytes) -> Cells:
    """The coarsest cells that part the decision points of a codebook's levels."""
    levels = np.frombuffer(codebook, np.float32)
    points, codes = decision_points(levels)
    is_signed = bool(np.any(levels < 0))
    lowest = float(2.0 ** np.floor(np.log2(np.abs(points).min())))
    for bits in range(MANTISSA_BITS):
        shift = MANTISSA_BITS - bits
        empty = Cells(lowest, shift, 0, is_signed, points[:0], codes[:0])
        # 1 is in a cell of its own: the last one.
        per_sign = (int(np.float32(1).view(np.int32)) >> shift) - empty.first + 1
        empty = dataclasses.replace(empty, per_sign=per_sign)
        with jax.ensure_compile_time_eval():
            at = np.asarray(cell_of(jnp.asarray(points), empty))
        if len(np.unique(at)) == len(at):
            break
    else:
        raise ValueError("two decision points of the codebook are the same")
    # Any value of a cell without a point has the cell's one code.
    first_bits = (np.arange(per_sign, dtype=np.int32) + empty.first) << shift
    values = first_bits.view(np.float32)
    values = np.concatenate([values, -values]) if is_signed else values
    below = codes[np.searchsorted(points, values, side="left")]
    above = below.copy()
    thresholds = np.full(values.shape, np.inf, np.float32)
    thresholds[at], below[at], above[at] = points, codes[:-1], codes[1:]
    packed = (below | above << ABOVE_SHIFT).astype(np.int32)
    return dataclasses.replace(empty, points=thresholds, codes=packed)


def cell_of(x: Float32[Array, "*shape"], cells: Cells) -> Int32[Array, "*shape"]:
    """The number of the cell of each ``x`` up to 1; a NaN has that of the lowest."""
    magnitude = jnp.abs(x) if cells.is_signed else x
    # Unlike a maximum, this drops a NaN.
    magnitude = jnp.where(magnitude > cells.lowest, magnitude, cells.lowest)
    cell = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    cell = (cell >> cells.shift) - cells.first
    if not cells.is_signed:
        return cell
    is_negative = jax.lax.bitcast_convert_type(x, jnp.int32) < 0
    return cell + jnp.where(is_negative, cells.per_sign, 0)


def encode(x: Float32[Array, "*shape"], cells: Cells) -> Int32[Array, "*shape"]:
    """The code of the level nearest to each ``x``; a tie goes to the lower level."""
    cell = cell_of(x, cells)
    codes = jnp.asarray(cells.codes)[cell]
    is_above = x > jnp.asarray(cells.points)[cell]
    return jnp.where(is_above, codes >> ABOVE_SHIFT, codes) & (2**ABOVE_SHIFT - 1)
