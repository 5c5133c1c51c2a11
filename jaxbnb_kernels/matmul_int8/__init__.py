"""LLM.int8: an int8 product of vector-wise scaled operands, its outliers apart."""

from jaxbnb_kernels.matmul_int8.api import (
    IMPLEMENTATIONS,
    matmul_int8,
    outlier_columns,
    quantize_rows,
)

__all__ = ["IMPLEMENTATIONS", "matmul_int8", "outlier_columns", "quantize_rows"]
