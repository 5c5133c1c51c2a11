"""Equinox models in few bits: linear layers are replaced by quantised ones.

It needs the extra ``equinox``.
"""

from jaxbnb.core.rules import Report
from jaxbnb.equinox._adapters import (
    LoraLinear,
    adapter_filter,
    add_adapters,
    merge_adapters,
)
from jaxbnb.equinox._layers import QuantEmbedding, QuantLinear
from jaxbnb.equinox._quantize_model import dequantize_model, quantize_model, report

__all__ = [
    "LoraLinear",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "adapter_filter",
    "add_adapters",
    "dequantize_model",
    "merge_adapters",
    "quantize_model",
    "report",
]
