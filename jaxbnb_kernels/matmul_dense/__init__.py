"""A product with a dense matrix in bfloat16, faster than XLA's on a CPU."""

from jaxbnb_kernels.matmul_dense.api import IMPLEMENTATIONS, matmul_dense

__all__ = ["IMPLEMENTATIONS", "matmul_dense"]
