"""The levels of a format: the nearest one to a value, and its codes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from jaxbnb.core import formats
from jaxbnb_kernels.codebooks import decision_points

_LARGEST = np.float32(127)


def searchable() -> list[str]:
    """Returns the formats that this package chooses codes for.

    They have an absmax, and few levels or evenly spaced ones.

    Example:
        >>> searchable()
        ['nf4', 'fp4', 'int4', 'int8']
    """
    packed = [x for x in formats.CODEBOOKS if formats.is_packed(x)]
    return [*(x for x in packed if x not in formats.SCALED), "int8"]


def nearest(x: Float32[Array, "*shape"], quant_type: str) -> Float32[Array, "*shape"]:
    """Returns the nearest level; a tie goes to the lower one, as in `quantize`.

    Args:
        x: values divided by their absmax; they may lie outside [-1, 1].
        quant_type: one of `searchable`.

    Example:
        >>> nearest(jnp.array([-2.0, 0.01, 0.9]), "nf4").tolist()
        [-1.0, 0.0, 1.0]
    """
    levels = formats.codebook(quant_type)
    if levels is None:
        return jnp.round(jnp.clip(x, -1.0, 1.0) * _LARGEST) / _LARGEST
    points, codes = decision_points(levels)
    result = jnp.full(x.shape, levels[codes[0]], jnp.float32)
    # Compares and selects, because XLA does not vectorise a look-up on a CPU.
    for point, code in zip(points, codes[1:], strict=True):
        result = jnp.where(x > point, levels[code], result)
    return result


def encode(
    levels: Float32[Array, "*batch n"], quant_type: str
) -> Integer[Array, "*batch stored"]:
    """Returns the codes of levels, in the layout of `jaxbnb.QuantizedArray`.

    Example:
        >>> [hex(x) for x in encode(jnp.array([0.0, 1.0, -1.0]), "nf4").tolist()]
        ['0x7f', '0x7']
    """
    codebook = formats.codebook(quant_type)
    if codebook is None:
        return jnp.round(levels * _LARGEST).astype(jnp.int8)
    points, codes = decision_points(codebook)
    steps = np.diff(codes.astype(np.uint8))
    code = jnp.full(levels.shape, codes[0], jnp.uint8)
    for point, step in zip(points, steps, strict=True):
        code = code + jnp.where(levels > point, step, np.uint8(0))
    if code.shape[-1] % 2:
        # An odd row ends with the code of zero, as in quantize.
        zero = codes[np.flatnonzero(codebook[codes] == 0)[0]]
        ends = [(0, 0)] * (code.ndim - 1) + [(0, 1)]
        code = jnp.pad(code, ends, constant_values=zero)
    return code[..., 0::2] << 4 | code[..., 1::2]
