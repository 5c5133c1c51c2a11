"""The product of groups of rows, each with its own blockwise-quantised matrix."""

from jaxbnb_kernels.grouped_matmul_blockwise.api import (
    IMPLEMENTATIONS,
    grouped_matmul_blockwise,
)

__all__ = ["IMPLEMENTATIONS", "grouped_matmul_blockwise"]
