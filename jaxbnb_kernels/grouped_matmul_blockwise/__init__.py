"""The product of groups of rows, each with its own blockwise-quantised matrix."""

from jaxbnb_kernels.grouped_matmul_blockwise.api import (
    IMPLEMENTATIONS,
    grouped_matmul_blockwise,
)
from jaxbnb_kernels.grouped_matmul_blockwise.mosaic_gpu import MOST_ROWS

__all__ = ["IMPLEMENTATIONS", "MOST_ROWS", "grouped_matmul_blockwise"]
