"""The rows that are looked up, and their absmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Integer

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import NESTED_BLOCK_SIZE, decode_scales


def look_up(
    ids: Integer[Array, "*batch"], weight: Weight
) -> tuple[Int32[Array, "*batch"], Float32[Array, "*batch blocks"]]:
    """Returns each id's row number and absmax; absmax is NaN if the row does not exist.

    Args:
        ids: row numbers; negative ones count from the end.
        weight: the matrix. Only the absmax of these rows are decoded.
    """
    num_rows, blocks = weight.absmax.shape
    ids = _saturate(ids)
    exists = (ids >= -num_rows) & (ids < num_rows)
    row = jnp.where(exists, jnp.where(ids < 0, ids + num_rows, ids), 0)
    absmax = weight.absmax[row]
    if weight.scale_type is not None:
        absmax = decode_scales(absmax, weight.tensor_scale, weight.scale_type)
    elif weight.nested is not None:
        nested_absmax, offset = weight.nested
        # Nested blocks run across rows, through all absmax of the matrix.
        block = (row[..., None] * blocks + jnp.arange(blocks)) // NESTED_BLOCK_SIZE
        level = jnp.asarray(DYNAMIC8_SIGNED)[absmax.astype(jnp.int32)]
        absmax = level * nested_absmax[block] + offset
    return row, jnp.where(exists[..., None], absmax.astype(jnp.float32), jnp.nan)


def _saturate(ids: Integer[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """Clips ids to int32: no matrix has more rows than that."""
    old, new = jnp.iinfo(ids.dtype), jnp.iinfo(jnp.int32)
    clipped = jnp.clip(ids, max(old.min, new.min), min(old.max, new.max))
    return clipped.astype(jnp.int32)
