"""Reads weights in float8 with a scale for each block of 128 x 128, as DeepSeek's.

A module ``M`` has ``M.weight`` in float8_e4m3 and ``M.weight_scale_inv``, which the
weight is multiplied by: one number for each block, or for all of it.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._stored_weights import FLOATS, Arrays, Found, hold, read_dtype
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import whole_axis_block_size

E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0: Final = np.dtype(ml_dtypes.float8_e8m0fnu)
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_SCALE: Final = "weight_scale_inv"


def find_weights(
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    _shapes: Mapping[str, np.ndarray],
) -> Found:
    """Returns the weights of an fp8 checkpoint, and the tensors that none needs."""
    if fields.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: fp8 of the format {str(fields['fmt'])[:40]!r}; jaxbnb "
            "reads 'e4m3'. Load the original checkpoint with quant="
        )
    sizes = fields.get("weight_block_size")
    if sizes is not None and not (
        isinstance(sizes, list) and len(sizes) == 2 and all(map(is_block_size, sizes))
    ):
        raise CheckpointError(
            f"{checkpoint.path}: weight_block_size must be two positive even numbers, "
            f"e.g. [128, 128]; got {str(sizes)[:40]}"
        )
    block = None if sizes is None else (int(sizes[0]), int(sizes[1]))
    weights, ignored = {}, []
    for name in checkpoint.tensors:
        if name.endswith((".activation_scale", ".input_scale")):
            ignored.append(name)
        if not name.endswith(f".{_SCALE}"):
            continue
        arrays = Arrays(checkpoint, name.removesuffix(_SCALE))
        rows, size = arrays.require("weight", (E4M3,), (None, None))
        if block is None:
            arrays.require_size(_SCALE, FLOATS, 1)
        else:
            grid = -(-rows // block[0]), -(-size // block[1])
            arrays.require(_SCALE, (*FLOATS, _E8M0), grid)
        info = TensorInfo((rows, size), read_dtype(checkpoint, _BFLOAT16))
        config = QuantConfig(
            "fp8_scaled", whole_axis_block_size(size) if block is None else block[1]
        )
        read = functools.partial(_read, arrays, rows, block)
        weights[f"{arrays.module}weight"] = hold(
            info, tuple(arrays.names), config, read
        )
    return weights, ignored


def is_block_size(value: Any) -> bool:
    """Whether a value of a config can be the size of blocks."""
    return type(value) is int and 0 < value <= 2**20 and value % 2 == 0


def spread_rows(scales: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Repeats what blocks of ``count`` rows have, ``(row blocks, n)``, for each row."""
    return scales[np.arange(rows) // count]


def _read(arrays: Arrays, rows: int, block: tuple[int, int] | None) -> dict[str, Any]:
    scales = arrays.read(_SCALE)
    scales = scales.reshape(1, 1) if block is None else scales
    return {
        "codes": arrays.read("weight").view(np.uint8),
        "absmax": spread_rows(
            scales.astype(np.float32), rows if block is None else block[0], rows
        ),
    }
