"""The grouped product on GPUs: tiles of sorted rows, each with the matrix of its group.

`mosaic_gpu_kernel_mma_forward` and `mosaic_gpu_kernel_mma_gradient` compute it in one
launch, also on Hopper. A tile has rows of one group, at any place in x, so nothing is
moved or filled up. The number of tiles that groups need is known only when they are
computed. As many start as any groups could need, and those without rows read one tile
of codes that another one reads too.

The tiles of a group run together, so that its codes come from memory once. They decode
them again. If groups have more than ``MOST_ROWS`` on average, each group's product is
one of `matmul_blockwise`, with all rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jaxbnb_kernels._batching import one_after_another
from jaxbnb_kernels._tiles import PRODUCT_COLUMNS
from jaxbnb_kernels.grouped_matmul_blockwise.mosaic_gpu import MOST_ROWS
from jaxbnb_kernels.grouped_matmul_blockwise.xla import one_by_one
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel as of_one
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_forward as forward
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_gradient as gradient
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import Levels
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_mma_fragments import (
    has_products_of,
)

# Rows of a tile: with more, its place would leave too few registers for 8-bit codes or
# nested absmax.
TILE_ROWS = 16


def matmul(
    x: Float[Array, "*leading m k"],
    group_sizes: Int32[Array, "*leading groups"],
    codes: UInt8[Array, "*leading groups rows stored"],
    absmax: Float32[Array, "*leading groups rows blocks"]
    | UInt8[Array, "*leading groups rows blocks"],
    *nested: Float32[Array, "*leading_groups_entries"],
    **options: Any,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that a kernel supports it.

    Args:
        x: array of any floating dtype; the result has the same. A leading axis has
            size one in arrays that are the same along it.
        group_sizes: number of rows of each group.
        codes: see `dequantize_blockwise`.
        absmax: see `dequantize_blockwise`.
        *nested: nested absmax and offset of each matrix, if any.
        **options: those of the product of one matrix, see `matmul_blockwise`.
    """
    multiply = functools.partial(_multiply, **options)
    arrays = x, group_sizes, codes, absmax, *nested
    return (one_after_another(multiply, x.ndim - 2, *arrays),)


def _multiply(
    x,
    group_sizes,
    codes,
    absmax,
    *nested,
    codebook,
    block_size,
    size,
    transpose,
    compute_dtype,
):
    (m, _), (groups, rows, _) = x.shape, codes.shape
    if nested:
        nested = nested[0][:, None], nested[1][:, None, None]
    is_fused = (
        0 < m <= MOST_ROWS * groups
        and codes.size > 0
        and size % PRODUCT_COLUMNS == 0
        and has_products_of(compute_dtype)
    )
    if not is_fused:

        def multiply(x, matrix):
            (product,) = of_one.matmul(
                x,
                *matrix,
                codebook=codebook,
                block_size=block_size,
                size=size,
                transpose=transpose,
                compute_dtype=compute_dtype,
            )
            return product

        columns = rows if transpose else size
        return one_by_one(multiply, x, group_sizes, (codes, absmax, *nested), columns)
    levels = Levels.of(codebook)
    kernel: Any = forward if transpose else gradient
    # Half of the groups may have twice the average.
    tokens = min(m, math.ceil(2 * m / groups), TILE_ROWS)
    config = kernel.heuristic(tokens, rows, size, min(m, groups), levels.lookup)
    tiles = place_tiles(group_sizes, m, config.block_m)
    (product,) = kernel.multiply(
        x.astype(compute_dtype)[None],
        jax.lax.bitcast_convert_type(codes, jnp.uint8),
        absmax,
        nested,
        levels,
        block_size,
        config,
        x.dtype,
        tiles,
    )
    # Nothing is written to the rows after the last group.
    exists = jnp.arange(m) < jnp.sum(group_sizes)
    return jnp.where(exists[:, None], product, jnp.zeros_like(product))


def place_tiles(
    group_sizes: Int32[Array, " groups"], num_rows: int, block_m: int
) -> Int32[Array, "tiles 3"]:
    """Returns each tile's matrix, its first row, and the row where its group ends.

    There are as many tiles as any ``group_sizes`` could need. Those that are not needed
    have no rows, and the matrix of the last one that is.
    """
    groups = len(group_sizes)
    # Each group with rows has a tile, and another one for every further ``block_m``.
    with_rows = min(groups, num_rows)
    count = with_rows + (num_rows - with_rows) // block_m
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    ends_of_tiles = jnp.cumsum(-((starts - ends) // block_m))
    number = jnp.arange(count, dtype=jnp.int32)
    number_needed = jnp.minimum(number, ends_of_tiles[-1] - 1)
    group = jnp.sum(number_needed[:, None] >= ends_of_tiles, axis=1, dtype=jnp.int32)
    end, end_of_tiles = ends[group], ends_of_tiles[group]
    first_tile = end_of_tiles - -((starts[group] - end) // block_m)
    first = starts[group] + (number - first_tile) * block_m
    is_needed = number < end_of_tiles
    return jnp.stack([group, jnp.where(is_needed, first, end), end], axis=1)
