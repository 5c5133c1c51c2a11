"""Functions on blocks of an array, shared by the implementations of the ops."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num, Shaped


def split(
    x: Shaped[Array, "*batch n"], block_size: int, fill: int = 0
) -> Shaped[Array, "*batch blocks size"]:
    """Splits the last axis into blocks. The last one is filled, by default with zeros.

    A row shorter than a block is one block of its length, rounded up to an even number.
    """
    n = x.shape[-1]
    block_size = min(block_size, n + n % 2) or block_size
    short = -n % block_size
    if short:
        pad = [(0, 0)] * (x.ndim - 1) + [(0, short)]
        x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(*x.shape[:-1], -(-n // block_size), block_size)


def join(blocks: Num[Array, "*batch blocks size"], n: int) -> Num[Array, "*batch {n}"]:
    """Undoes `split`: returns the first ``n`` elements of the joined blocks."""
    *batch, num_blocks, size = blocks.shape
    return blocks.reshape(*batch, num_blocks * size)[..., :n]


def absmax(blocks: Float[Array, "*blocks size"]) -> Float32[Array, "*blocks"]:
    """Returns max(abs(x)) of each block: NaN if an element is NaN, 0 if it is empty."""
    # On a CPU, XLA's maximum of a large array may skip a NaN.
    has_nan = jnp.any(blocks != blocks, axis=-1)
    return jnp.where(has_nan, jnp.nan, absmax_of_finite(blocks))


def absmax_of_finite(
    blocks: Float[Array, "*blocks size"],
) -> Float32[Array, "*blocks"]:
    """Returns max(abs(x)) of each block, if no element is NaN."""
    return jnp.max(jnp.abs(blocks), axis=-1, initial=0.0)


def normalize(
    blocks: Float32[Array, "*blocks size"], absmax: Float32[Array, "*blocks"]
) -> Float32[Array, "*blocks size"]:
    """Divides blocks by absmax, as x * (1 / absmax) like bitsandbytes.

    This works at any magnitude. Beyond 2^126 and below 2^-126, 1 / absmax leaves
    float32's normal range. So extreme blocks are first brought nearer to 1 by a power
    of two, which is exact. A block of zeros stays zeros.
    """
    nearer, reciprocal = factors(absmax)
    return (blocks * nearer[..., None]) * reciprocal[..., None]


def factors(
    absmax: Float32[Array, "*blocks"], reciprocal: Callable = lambda x: 1.0 / x
) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"]]:
    """Returns the two factors that `normalize` multiplies a block by, in order."""
    nearer = jnp.where(absmax > 2.0**64, 2.0**-64, 1.0).astype(jnp.float32)
    nearer = jnp.where(absmax < 2.0**-64, jnp.float32(2.0**64), nearer)
    return nearer, jnp.where(absmax > 0, reciprocal(absmax * nearer), 0.0)
