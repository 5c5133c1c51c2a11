"""jaxbnb: bitsandbytes for JAX."""

from jaxbnb import convert, finetune, linen, lora, models, nnx, optim
from jaxbnb.core import QuantConfig, QuantizedArray, dequantize, matmul, quantize
from jaxbnb.linen import QuantDense
from jaxbnb.models import load_pretrained
from jaxbnb.optim import adam8bit, adamw8bit, paged_adam8bit, paged_adamw8bit

__all__ = [
    "QuantConfig",
    "QuantDense",
    "QuantizedArray",
    "adam8bit",
    "adamw8bit",
    "convert",
    "dequantize",
    "finetune",
    "linen",
    "load_pretrained",
    "lora",
    "matmul",
    "models",
    "nnx",
    "optim",
    "paged_adam8bit",
    "paged_adamw8bit",
    "quantize",
]
