"""jaxbnb: bitsandbytes for JAX."""

import importlib.metadata

from jaxbnb import convert, finetune, linen, lora, models, nnx, optim
from jaxbnb.core import QuantConfig, QuantizedArray, dequantize, matmul, quantize
from jaxbnb.linen import QuantDense
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import summary
from jaxbnb.optim import (
    adagrad8bit,
    adam8bit,
    adamw8bit,
    ademamix8bit,
    lamb8bit,
    lars8bit,
    lion8bit,
    muon8bit,
    paged_adam8bit,
    paged_adamw8bit,
    quantize_state,
    rmsprop8bit,
    sgd8bit,
)

__version__ = importlib.metadata.version("jaxbnb")

__all__ = [
    "QuantConfig",
    "QuantDense",
    "QuantizedArray",
    "adagrad8bit",
    "adam8bit",
    "adamw8bit",
    "ademamix8bit",
    "convert",
    "dequantize",
    "finetune",
    "lamb8bit",
    "lars8bit",
    "linen",
    "lion8bit",
    "load_pretrained",
    "lora",
    "matmul",
    "models",
    "muon8bit",
    "nnx",
    "optim",
    "paged_adam8bit",
    "paged_adamw8bit",
    "quantize",
    "quantize_state",
    "rmsprop8bit",
    "sgd8bit",
    "summary",
]
