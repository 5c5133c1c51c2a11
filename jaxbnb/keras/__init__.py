"""Keras 3 models in few bits, on the JAX backend: layers change in place.

It needs the extra ``keras``, and ``KERAS_BACKEND=jax`` when Keras is imported.
"""

from jaxbnb.core.rules import Report
from jaxbnb.keras._layers import (
    QuantDense,
    QuantEinsumDense,
    QuantEmbedding,
    QuantReversibleEmbedding,
)
from jaxbnb.keras._load import load_model, load_weights
from jaxbnb.keras._quantize_model import add_adapters, dequantize_model, quantize_model

__all__ = [
    "QuantDense",
    "QuantEinsumDense",
    "QuantEmbedding",
    "QuantReversibleEmbedding",
    "Report",
    "add_adapters",
    "dequantize_model",
    "load_model",
    "load_weights",
    "quantize_model",
]
