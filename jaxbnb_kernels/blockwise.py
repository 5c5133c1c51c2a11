"""Blocks of an array: shared by the jnp implementations of the ops."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num, Shaped


def split(
    x: Shaped[Array, "*batch n"], block_size: int, fill: int = 0
) -> Shaped[Array, "*batch blocks size"]:
    """Blocks along the last axis, the last one filled up, with zeros by default.

    A row shorter than a block is one block of the row's own length: nothing to fill.
    """
    n = x.shape[-1]
    block_size = min(block_size, n + n % 2) or block_size
    short = -n % block_size
    if short:
        pad = [(0, 0)] * (x.ndim - 1) + [(0, short)]
        x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(*x.shape[:-1], -(-n // block_size), block_size)


def join(blocks: Num[Array, "*batch blocks size"], n: int) -> Num[Array, "*batch {n}"]:
    """The inverse of `split`: ``n`` elements of the last axis."""
    *batch, num_blocks, size = blocks.shape
    return blocks.reshape(*batch, num_blocks * size)[..., :n]


def absmax(blocks: Float[Array, "*blocks size"]) -> Float32[Array, "*blocks"]:
    """max(abs(x)) of each block: NaN where an element is NaN, 0 where it is empty."""
    # XLA's maximum of a large array on a CPU may pass over a NaN.
    has_nan = jnp.any(blocks != blocks, axis=-1)
    return jnp.where(has_nan, jnp.nan, absmax_of_finite(blocks))


def absmax_of_finite(
    blocks: Float[Array, "*blocks size"],
) -> Float32[Array, "*blocks"]:
    """The same of what has no NaN."""
    return jnp.max(jnp.abs(blocks), axis=-1, initial=0.0)


def normalize(
    blocks: Float32[Array, "*blocks size"], absmax: Float32[Array, "*blocks"]
) -> Float32[Array, "*blocks size"]:
    """X / absmax, as x * (1 / absmax) like bitsandbytes, at any magnitude.

    1 / absmax leaves float32's normal range beyond 2^126 and below 2^-126, so extreme
    blocks are first brought nearer to 1 by a power of two, which is exact. A block of
    zeros stays zeros.
    """
    nearer, reciprocal = factors(absmax)
    return (blocks * nearer[..., None]) * reciprocal[..., None]


def factors(
    absmax: Float32[Array, "*blocks"], reciprocal: Callable = lambda x: 1.0 / x
) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"]]:
    """The two numbers that `normalize` multiplies a block with, one after the other."""
    nearer = jnp.where(absmax > 2.0**64, 2.0**-64, 1.0).astype(jnp.float32)
    nearer = jnp.where(absmax < 2.0**-64, jnp.float32(2.0**64), nearer)
    return nearer, jnp.where(absmax > 0, reciprocal(absmax * nearer), 0.0)
