"""The product with a blockwise-quantised matrix, which stays quantised in memory."""

from jaxbnb_kernels.matmul_blockwise.api import (
    IMPLEMENTATIONS,
    Weight,
    matmul_blockwise,
)

__all__ = ["IMPLEMENTATIONS", "Weight", "matmul_blockwise"]
