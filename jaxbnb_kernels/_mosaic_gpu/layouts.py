"""Layouts: which elements of a tile each lane holds in its registers."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from jaxbnb_kernels._tiles import LANES, WARPS, tile_rows

# In a warpgroup's matrix instruction: lanes that share a row of the left operand, and
# rows that a warp holds at a time.
LANES_OF_A_ROW = 4
ROWS_OF_A_WARP = 8


def rows_layout(columns: int, vector_size: int) -> Any:
    """Returns the layout of rows of ``columns`` elements, each in one warp.

    A lane holds ``vector_size`` neighbours, so that a warp reads and writes whole
    cache lines, and a row's maximum needs no other warp. An array has a multiple of
    ``tile_rows(columns, vector_size)`` rows.
    """
    width = min(columns, LANES * vector_size)
    rows = tile_rows(columns, vector_size) // WARPS
    # (..., warp, 1, row, lane of the row, element of the lane)
    tiles = (WARPS * rows, width), (rows, width), (vector_size,)
    return tiled(tiles, (-5,), (-3, -2))


def tiled(tiles: Any, warp_dims: Any, lane_dims: Any) -> Any:
    """Returns a layout of tiles within tiles; a register holds the innermost axis."""
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiles), warp_dims, lane_dims, -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


def x_layout(columns: int, width: int) -> Any:
    """Returns the layout of rows of ``columns`` 16-bit numbers, 16 bytes a lane.

    A warp has whole rows of tiles of 8 rows and ``width`` columns. These are contiguous
    in shared memory, so the warp writes them without bank conflicts.
    """
    vector = 8
    at_once = WARPS * LANES * vector
    tiles = (
        (at_once // columns, columns),
        (LANES * vector // width, width),
        (vector,),
    )
    return tiled(tiles, (-5, -4), (-3, -2))


def apart(sums: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
    """Takes apart the pairs in which ``Layout.WGMMA`` holds sums.

    The numbers can then be written to neighbouring rows instead of columns.
    """
    tiles = plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,)))
    layout = plgpu.Layout.TILED(tiles, (-8,), (-4, -3), -1)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout),
    )

    @inline
    def inlined(_, sums):
        return sums.to_layout(mgpu.fragmented_array.WGMMA_LAYOUT_ACC_32BIT)

    return inlined(sums)
