"""The specification: decode everything, update it, encode everything."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels import _dynamic8, blockwise
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment

# The code of zero in the signed and in the unsigned dynamic map.
ZERO_CODE = {True: 127, False: 0}


def update(
    rule, scalars, grad: Float[Array, "*shape"], moments, layout: BlockLayout, param
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """See `update_8bit`."""
    outer, inner = grad.shape[: layout.axis], grad.shape[layout.axis :]
    rows = (*outer, math.prod(inner))
    blocks = (*outer, -(-rows[-1] // layout.size))
    result, codes, absmax = update_rows(
        rule,
        scalars,
        [m.codes.reshape(rows) for m in moments],
        [m.absmax.reshape(blocks) for m in moments],
        [m.signed for m in moments],
        layout.size,
        grad.reshape(rows),
        None if param is None else param.reshape(rows),
    )
    new = (
        Moment(c.reshape(grad.shape), a.reshape(layout.absmax_shape), m.signed)
        for c, a, m in zip(codes, absmax, moments, strict=True)
    )
    return result.reshape(grad.shape), tuple(new)


def update_rows(rule, scalars, codes, absmax, signed, block_size, grad, param):
    """Updates rows ``(*outer, n)``, with blocks along the last axis."""
    # A short block is filled with the code of zero. Other codes would count for absmax.
    old = tuple(
        decode(blockwise.split(c, block_size, fill=ZERO_CODE[s]), a, s)
        for c, a, s in zip(codes, absmax, signed, strict=True)
    )
    g = blockwise.split(grad.astype(jnp.float32), block_size)
    if param is None:
        result, kept = rule.apply(scalars, g, old)
    else:
        p = blockwise.split(param.astype(jnp.float32), block_size)
        result, kept = rule.apply_to(scalars, g, old, p)
    n, dtype = grad.shape[-1], (grad if param is None else param).dtype
    absmax = [blockwise.absmax_of_finite(m) for m in kept]
    codes = [
        blockwise.join(encode(m, a, s), n)
        for m, a, s in zip(kept, absmax, signed, strict=True)
    ]
    return blockwise.join(result, n).astype(dtype), codes, absmax


def decode(codes, absmax, signed: bool):
    """Decodes blocks of codes to float32."""
    levels = jnp.asarray(DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED)
    return levels[codes.astype(jnp.int32)] * absmax[..., None]


def encode(blocks, absmax, signed: bool):
    """Encodes blocks of float32 to codes."""
    scaled = blockwise.normalize(blocks, absmax)
    return _dynamic8.encode(scaled, signed=signed, keep_positive=not signed)
