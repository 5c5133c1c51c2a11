"""Reads experts that transformers stores in MXFP4, as those of gpt-oss.

A weight ``W`` of all experts, ``(experts, in, out)``, has ``W_blocks``, uint8
``(experts, out, blocks, 16)`` with two codes per byte, the first in the low nibble, and
``W_scales``, the bits of E8M0 floats ``(experts, out, blocks)``.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._packing import swap_nibbles
from jaxbnb.convert._stored_weights import Arrays, Found, StoredWeight, read_dtype
from jaxbnb.core import QuantConfig, QuantizedArray

_UINT8: Final = (np.dtype(np.uint8),)
_BLOCK_BYTES: Final = 16
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)


def find_weights(
    checkpoint: Checkpoint,
    _fields: Mapping[str, Any],
    _shapes: Mapping[str, np.ndarray],
) -> Found:
    """Returns the weights of an mxfp4 checkpoint, and the tensors that none needs."""
    weights = {}
    for name in checkpoint.tensors:
        if not name.endswith("_blocks"):
            continue
        weight = name.removesuffix("_blocks")
        arrays = Arrays(checkpoint, f"{weight}_")
        shape = arrays.require("blocks", _UINT8, (None, None, None, _BLOCK_BYTES))
        arrays.require("scales", _UINT8, shape[:3])
        experts, rows, blocks = shape[:3]
        info = TensorInfo(
            (experts, 32 * blocks, rows), read_dtype(checkpoint, _BFLOAT16)
        )
        read_quantized = functools.partial(_read_quantized, arrays, info)
        weights[weight] = StoredWeight(
            info,
            tuple(arrays.names),
            functools.partial(_read, read_quantized),
            QuantConfig("mxfp4"),
            read_quantized,
        )
    return weights, []


def _read_quantized(arrays: Arrays, info: TensorInfo) -> QuantizedArray:
    experts, size, rows = info.shape
    blocks: Any = swap_nibbles(arrays.read("blocks").reshape(experts, rows, size // 2))
    scales: Any = arrays.read("scales")
    return QuantizedArray(
        codes=blocks,
        absmax=scales,
        nested_absmax=None,
        offset=None,
        quant_type="mxfp4",
        block_size=32,
        axis=-2,
        axis_size=size,
        dtype=info.dtype,
    )


def _read(read_quantized: functools.partial[QuantizedArray]) -> np.ndarray:
    return np.asarray(read_quantized().dequantize())
