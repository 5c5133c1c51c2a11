"""Formats, quantised arrays and their product, without layers or optimizers."""

from jaxbnb.core._cast import cast_floating
from jaxbnb.core._embed import embed
from jaxbnb.core._matmul import matmul
from jaxbnb.core._memory import tree_nbytes
from jaxbnb.core._quantize import dequantize, quantize
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.config import QuantConfig
from jaxbnb.core.tree import decode_tree, quantize_tree, tree_report

__all__ = [
    "QuantConfig",
    "QuantizedArray",
    "cast_floating",
    "decode_tree",
    "dequantize",
    "embed",
    "matmul",
    "quantize",
    "quantize_tree",
    "tree_nbytes",
    "tree_report",
]
