"""Dynamic 8-bit encoding by arithmetic, without a search or a table.

A decade of the map holds 2^e equal cells, and its codes are 2^e ... 2^(e+1) - 1 (less
one in the unsigned map). So a code, read as a float 2^e (1 + f), has the decade as its
exponent and the position within it as its mantissa. Encoding takes one multiply and one
add, with constants chosen by six compares. XLA vectorises that. A sorted search over
255 mid-points costs twenty times as much on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from jaxbnb_kernels.codebooks import NUM_DECADES

# Cells of the first decade: 2^0 in the signed map, 2^1 in the unsigned one.
_FIRST_EXPONENT = {True: 0, False: 1}


def _lowest(decade: int, cells: int) -> float:
    """Returns the lowest level of a decade: the middle of its first cell."""
    return 10.0 ** (decade - NUM_DECADES + 1) * (0.1 + 0.45 / cells)


def _highest(decade: int, cells: int) -> float:
    return 10.0 ** (decade - NUM_DECADES + 1) * (1.0 - 0.45 / cells)


def encode(
    x: Float32[Array, "*shape"], *, signed: bool, keep_positive: bool = False
) -> UInt8[Array, "*shape"]:
    """Encodes each ``x`` in [-1, 1], or [0, 1] if unsigned, to the nearest level.

    Agrees with the mid-point definition, except within a relative 2^-20 of a decision
    point, where both neighbours are equally near to within float32's precision.

    Args:
        x: normalised values.
        signed: whether to use the signed map.
        keep_positive: whether positive values below the smallest level get that level
            instead of zero.
    """
    first = _FIRST_EXPONENT[signed]
    cells = [2 ** (first + i) for i in range(NUM_DECADES)]
    # position = 2^e (1 + f) = magnitude * scale + (8/9) 2^e: 2^e at the decade's low
    # edge, 10^(i-7), and 2^(e+1) at its high edge, 10^(i-6). The code is the position
    # rounded down: k + 1/2 stands for code k.
    scales = [n / (0.9 * 10.0 ** (i - NUM_DECADES + 1)) for i, n in enumerate(cells)]
    magnitude = jnp.abs(x) if signed else x
    scale = jnp.full(x.shape, np.float32(scales[0]))
    power = jnp.full(x.shape, np.float32(cells[0]))
    for i in range(1, NUM_DECADES):
        boundary = (_highest(i - 1, cells[i - 1]) + _lowest(i, cells[i])) / 2
        is_above = magnitude > np.float32(boundary)
        scale = jnp.where(is_above, np.float32(scales[i]), scale)
        power = jnp.where(is_above, np.float32(cells[i]), power)
    position = magnitude * scale + np.float32(8 / 9) * power
    # Between a decade's high edge and the boundary to the next, the code is its last.
    last = 2 * power - np.float32(0.5)
    position = jnp.where(position < last, position, last)
    # Positive values only: the map lacks -1, and its lowest level is -0.993.
    near_one = np.float32((1.0 + _highest(NUM_DECADES - 1, cells[-1])) / 2)
    position = jnp.where(x > near_one, np.float32(2 * cells[-1] + 0.5), position)
    if keep_positive:
        lowest = np.float32(cells[0] + 0.5)
        position = jnp.where(position > lowest, position, lowest)
    near_zero = np.float32(0 if keep_positive else _lowest(0, cells[0]) / 2)
    position = jnp.where(magnitude > near_zero, position, np.float32(cells[0] - 0.5))
    # A tie goes to the lower index, which for negative values is the larger magnitude.
    if signed:
        return _ceil(jnp.where(x < 0, -position, position - 1), 127)
    return _ceil(position, -2)


def _ceil(x: Float32[Array, "*shape"], offset: int) -> UInt8[Array, "*shape"]:
    """Returns ceil(x) + offset, read from the mantissa of 2^23 plus that.

    A conversion would saturate, which takes a CPU five more instructions. The encoder
    likewise compares and selects instead of taking a minimum, which would spend three
    on NaN.
    """
    bits = jax.lax.bitcast_convert_type(
        jnp.ceil(x) + np.float32(2**23 + offset), jnp.int32
    )
    return bits.astype(jnp.uint8)
