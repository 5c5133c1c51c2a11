"""The specification: decode all, step, encode all."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels import _blocks, _dynamic8
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment


def update(
    rule, scalars, grad: Float[Array, "*shape"], moments, layout: BlockLayout
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    outer, inner = grad.shape[: layout.axis], grad.shape[layout.axis :]
    rows = grad.reshape(*outer, math.prod(inner))
    codes = [m.codes.reshape(rows.shape) for m in moments]
    blocks = (*rows.shape[:-1], -(-rows.shape[-1] // layout.size))
    absmax = [m.absmax.reshape(blocks) for m in moments]
    signed = [m.signed for m in moments]
    rows, codes, absmax = update_rows(
        rule, scalars, rows, codes, absmax, signed, layout.size
    )
    new = (
        Moment(c.reshape(grad.shape), a.reshape(layout.absmax_shape), s)
        for c, a, s in zip(codes, absmax, signed, strict=True)
    )
    return rows.reshape(grad.shape), tuple(new)


def update_rows(rule, scalars, grad, codes, absmax, signed, block_size):
    """The same on rows ``(*outer, n)`` whose blocks follow along the last axis."""
    n = grad.shape[-1]
    old = [
        decode(_blocks.split(c, block_size), a, s)
        for c, a, s in zip(codes, absmax, signed, strict=True)
    ]
    g = _blocks.split(grad.astype(jnp.float32), block_size)
    direction, kept = rule.apply(scalars, g, tuple(old))
    absmax = [_blocks.absmax(m) for m in kept]
    codes = [
        _blocks.join(encode(m, a, s), n)
        for m, a, s in zip(kept, absmax, signed, strict=True)
    ]
    return _blocks.join(direction, n).astype(grad.dtype), codes, absmax


def decode(codes, absmax, signed: bool):
    """Blocks of codes to float32."""
    levels = jnp.asarray(DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED)
    return levels[codes.astype(jnp.int32)] * absmax[..., None]


def encode(blocks, absmax, signed: bool):
    """Blocks of float32 to codes."""
    scaled = _blocks.normalize(blocks, absmax)
    return _dynamic8.encode(scaled, signed=signed, keep_positive=not signed)
