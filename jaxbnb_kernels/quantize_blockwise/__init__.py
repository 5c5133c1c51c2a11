"""Blockwise quantisation: floats to codes and one absmax per block, and back."""

from jaxbnb_kernels.quantize_blockwise.api import (
    IMPLEMENTATIONS,
    dequantize_blockwise,
    quantize_blockwise,
)
from jaxbnb_kernels.quantize_blockwise.nested import (
    dequantize_absmax,
    quantize_absmax,
)
from jaxbnb_kernels.quantize_blockwise.reference import NESTED_BLOCK_SIZE
from jaxbnb_kernels.quantize_blockwise.scales import decode_scales

__all__ = [
    "IMPLEMENTATIONS",
    "NESTED_BLOCK_SIZE",
    "decode_scales",
    "dequantize_absmax",
    "dequantize_blockwise",
    "quantize_absmax",
    "quantize_blockwise",
]
