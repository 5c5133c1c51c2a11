"""A product of fp8 with fp8; every row of both operands has one scale."""

from jaxbnb_kernels.matmul_fp8.api import IMPLEMENTATIONS, matmul_fp8, quantize_rows

__all__ = ["IMPLEMENTATIONS", "matmul_fp8", "quantize_rows"]
