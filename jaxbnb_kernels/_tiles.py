"""The sizes of what one warpgroup of a GPU kernel holds at a time.

Arithmetic only: whether a kernel serves a call is decided by these sizes, before Pallas
is imported.
"""

import numpy as np

# A warpgroup's warps, and the threads of each.
WARPS = 4
LANES = 32
# Bytes that a thread reads or writes at once.
WIDEST_ACCESS = 16
# Elements that a warpgroup decodes or encodes at a time: 32 a thread.
TILE = 4096
# The columns of W in a kernel's product are a multiple of this: whole tiles.
PRODUCT_COLUMNS = 128
# The longest row that `matmul_int8` quantises: its kernel has a copy of its steps for
# every 2048 columns.
MOST_INT8_COLUMNS = 2**15


def tile_rows(columns: int, vector_size: int) -> int:
    """The rows of ``columns`` elements that four warps hold side by side.

    Args:
        columns: elements of a row.
        vector_size: neighbours that a lane holds.
    """
    return WARPS * max(1, LANES * vector_size // columns)


def decoded_tile(block_size: int, dtype: np.dtype) -> tuple[int, int]:
    """The blocks that a warpgroup decodes to ``dtype``, and the elements of each."""
    least = tile_rows(block_size, WIDEST_ACCESS // dtype.itemsize)
    rows = max(least, TILE // block_size)
    return rows, min(block_size, TILE // rows)


def least_rows(block_size: int, dtype: np.dtype) -> int:
    """The fewest blocks that fill a warpgroup when it decodes them to ``dtype``."""
    _, columns = decoded_tile(block_size, dtype)
    return tile_rows(columns, WIDEST_ACCESS // dtype.itemsize)
