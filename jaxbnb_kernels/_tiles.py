"""Sizes of the tiles that one warpgroup of a GPU kernel holds at a time.

Arithmetic only: these sizes decide whether a kernel serves a call, before Pallas is
imported.
"""

import numpy as np

# Warps of a warpgroup, and threads of a warp.
WARPS = 4
LANES = 32
# Most bytes that a thread reads or writes at once.
WIDEST_ACCESS = 16
# Elements that a warpgroup decodes or encodes at a time: 32 a thread.
TILE = 4096
# Kernels multiply only whole tiles: the columns of W are a multiple of this.
PRODUCT_COLUMNS = 128
# The longest row that `matmul_int8` quantises: its kernel has a copy of its steps for
# every 2048 columns.
MOST_INT8_COLUMNS = 2**15


# Kernels number blocks, and rows of tiles, in 32 bits.
MOST_BLOCKS = 2**31 - 2**16


def numbered(blocks: int) -> int:
    """Returns ``blocks`` if a kernel can number as many.

    Raises:
        NotImplementedError: these are too many.
    """
    if blocks > MOST_BLOCKS:
        raise NotImplementedError(
            f"mosaic_gpu numbers up to {MOST_BLOCKS:,} blocks; these are {blocks:,}"
        )
    return blocks


def tile_rows(columns: int, vector_size: int) -> int:
    """Returns how many rows of ``columns`` elements four warps hold side by side.

    Args:
        columns: elements of a row.
        vector_size: adjacent elements that a lane holds.
    """
    return WARPS * max(1, LANES * vector_size // columns)


def decoded_tile(block_size: int, dtype: np.dtype) -> tuple[int, int]:
    """Returns the blocks in a tile decoded to ``dtype``, and the elements of each."""
    least = tile_rows(block_size, WIDEST_ACCESS // dtype.itemsize)
    rows = max(least, TILE // block_size)
    return rows, min(block_size, TILE // rows)


def least_rows(block_size: int, dtype: np.dtype) -> int:
    """Returns the fewest blocks that fill a warpgroup when decoded to ``dtype``."""
    _, columns = decoded_tile(block_size, dtype)
    return tile_rows(columns, WIDEST_ACCESS // dtype.itemsize)
