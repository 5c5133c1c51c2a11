"""Which rows are looked up, and their absmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Integer

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import NESTED_BLOCK_SIZE


def look_up(
    ids: Integer[Array, "*batch"], weight: Weight
) -> tuple[Int32[Array, "*batch"], Float32[Array, "*batch blocks"]]:
    """Returns a row number for each id, and the row's absmax; NaN if it does not exist.

    Args:
        ids: row numbers; negative ones count from the end.
        weight: the matrix; only these rows' absmax are decoded.
    """
    num_rows, blocks = weight.absmax.shape
    ids = _saturate(ids)
    exists = (ids >= -num_rows) & (ids < num_rows)
    row = jnp.where(exists, jnp.where(ids < 0, ids + num_rows, ids), 0)
    absmax = weight.absmax[row]
    if weight.nested is not None:
        nested_absmax, offset = weight.nested
        # Nested blocks follow along all absmax of the matrix, across its rows.
        block = (row[..., None] * blocks + jnp.arange(blocks)) // NESTED_BLOCK_SIZE
        level = jnp.asarray(DYNAMIC8_SIGNED)[absmax.astype(jnp.int32)]
        absmax = level * nested_absmax[block] + offset
    return row, jnp.where(exists[..., None], absmax.astype(jnp.float32), jnp.nan)


def _saturate(ids: Integer[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """In int32: what it cannot hold, no matrix has."""
    given, wanted = jnp.iinfo(ids.dtype), jnp.iinfo(jnp.int32)
    held = jnp.clip(ids, max(given.min, wanted.min), min(given.max, wanted.max))
    return held.astype(jnp.int32)
