"""jaxbnb: bitsandbytes for JAX."""

from jaxbnb import linen, nnx
from jaxbnb.core import QuantConfig, QuantizedArray, dequantize, matmul, quantize
from jaxbnb.linen import QuantDense

__all__ = [
    "QuantConfig",
    "QuantDense",
    "QuantizedArray",
    "dequantize",
    "linen",
    "matmul",
    "nnx",
    "quantize",
]
