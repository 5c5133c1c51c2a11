"""Quantised layers for Flax NNX, and an embedding for low-bit optimizers."""

from jaxbnb.core.rules import Report
from jaxbnb.nnx._embed import QuantEmbed
from jaxbnb.nnx._general import QuantEinsum, QuantLinearGeneral
from jaxbnb.nnx._kept import keep_product
from jaxbnb.nnx._linear import QuantLinear
from jaxbnb.nnx._outliers import outlier_columns
from jaxbnb.nnx._param import QuantParam
from jaxbnb.nnx._quantize_model import dequantize_model, quantize_model
from jaxbnb.nnx._stable_embed import StableEmbed
from jaxbnb.nnx._stack import LayerStack, Remat
from jaxbnb.nnx._summary import summary

__all__ = [
    "LayerStack",
    "QuantEinsum",
    "QuantEmbed",
    "QuantLinear",
    "QuantLinearGeneral",
    "QuantParam",
    "Remat",
    "Report",
    "StableEmbed",
    "dequantize_model",
    "keep_product",
    "outlier_columns",
    "quantize_model",
    "summary",
]
