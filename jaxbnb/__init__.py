"""jaxbnb: bitsandbytes for JAX."""

from jaxbnb.core import QuantConfig, QuantizedArray, dequantize, matmul, quantize

__all__ = ["QuantConfig", "QuantizedArray", "dequantize", "matmul", "quantize"]
