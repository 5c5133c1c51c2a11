"""LLM.int8: a vector-wise scaled int8 product, with outliers multiplied apart."""

from jaxbnb_kernels.matmul_int8.api import (
    IMPLEMENTATIONS,
    matmul_int8,
    outlier_columns,
    quantize_rows,
)

__all__ = ["IMPLEMENTATIONS", "matmul_int8", "outlier_columns", "quantize_rows"]
