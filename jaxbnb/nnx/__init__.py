"""Quantised layers for Flax NNX."""

from jaxbnb.nnx._linear import QuantLinear, QuantParam
from jaxbnb.nnx._quantize_model import quantize_model
from jaxbnb.nnx._stack import LayerStack

__all__ = ["LayerStack", "QuantLinear", "QuantParam", "quantize_model"]
