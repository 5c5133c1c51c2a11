"""jaxbnb: bitsandbytes for JAX."""

from jaxbnb import linen, lora, nnx, optim
from jaxbnb.core import QuantConfig, QuantizedArray, dequantize, matmul, quantize
from jaxbnb.linen import QuantDense
from jaxbnb.optim import adam8bit, adamw8bit, paged_adam8bit, paged_adamw8bit

__all__ = [
    "QuantConfig",
    "QuantDense",
    "QuantizedArray",
    "adam8bit",
    "adamw8bit",
    "dequantize",
    "linen",
    "lora",
    "matmul",
    "nnx",
    "optim",
    "paged_adam8bit",
    "paged_adamw8bit",
    "quantize",
]
