"""Quantised layers for Flax Linen, and an embedding for low-bit optimizers."""

from jaxbnb.linen._dense import QuantDense
from jaxbnb.linen._dense_general import QuantDenseGeneral
from jaxbnb.linen._embed import QuantEmbed
from jaxbnb.linen._intercept import use_quantized
from jaxbnb.linen._outliers import outlier_columns
from jaxbnb.linen._quantize_params import (
    dequantize_params,
    merge_quantized,
    quantize_params,
    split_quantized,
)
from jaxbnb.linen._stable_embed import StableEmbed, StateBits, with_state_bits

__all__ = [
    "QuantDense",
    "QuantDenseGeneral",
    "QuantEmbed",
    "StableEmbed",
    "StateBits",
    "dequantize_params",
    "merge_quantized",
    "outlier_columns",
    "quantize_params",
    "split_quantized",
    "use_quantized",
    "with_state_bits",
]
