"""Reads weights that torchao stores in safetensors files, as transformers writes them.

A weight ``M.weight`` has ``M._weight_qdata``, one code for each element,
``M._weight_scale`` and perhaps ``M._weight_zero_point``. The metadata of the file have
a JSON text for it: ``_type``, the class of the tensor, and ``_data``, its attributes.

References:
    torchao.prototype.safetensors.safetensors_support, in torchao 0.18.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._bitsandbytes_weights import DTYPES
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._fp8_reader import E4M3, spread_rows
from jaxbnb.convert._packing import pack_nibbles
from jaxbnb.convert._stored_weights import (
    FLOATS,
    Arrays,
    Found,
    StoredWeight,
    hold,
    multiply_integers,
    read_dtype,
)
from jaxbnb.convert.json_files import parse_json
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import whole_axis_block_size

_INT8: Final = (np.dtype(np.int8),)
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_FLOAT8, _INTX = "Float8Tensor", "IntxUnpackedToInt8Tensor"
_KINDS: Final = ("Int8Tensor", _INTX, _FLOAT8)
# Format by the size of a code, and whether there are zero points.
_FORMATS: Final = {
    (4, False): "int4_scaled",
    (4, True): "uint4",
    (8, False): "int8_scaled",
    (8, True): "uint8",
}
# Scales that are fixed for what the weight is multiplied with.
_ACTIVATIONS: Final = ("act_quant_scale", "act_quant_zero_point")


def find_zero_points(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names of zero points that may all be zero, for `find_weights`.

    torchao writes them for symmetric weights too. Only those with one for each row are
    read, because groups have too many.
    """
    found = []
    for name, info in tensors.items():
        codes = tensors.get(f"{name.removesuffix('zero_point')}qdata")
        rows = codes.shape[0] if codes is not None and codes.shape else 0
        if name.endswith("_zero_point") and math.prod(info.shape) <= rows:
            found.append(name)
    return found


def find_weights(
    checkpoint: Checkpoint,
    _fields: Mapping[str, Any],
    zero_points: Mapping[str, np.ndarray],
) -> Found:
    """Returns the weights of a torchao checkpoint, and the tensors that none needs."""
    weights: dict[str, StoredWeight] = {}
    ignored: list[str] = []
    for name in checkpoint.tensors:
        found = re.fullmatch(r"(.+)\._(\w+)_qdata", name)
        if found is None:
            continue
        weight = ".".join(found.groups())
        kind, fields = _describe(checkpoint, weight)
        arrays = Arrays(checkpoint, name.removesuffix("qdata"))
        zero_point = zero_points.get(f"{arrays.module}zero_point")
        is_symmetric = zero_point is not None and not zero_point.any()
        weights[weight] = _make_weight(arrays, kind, fields, is_symmetric)
        ignored += [arrays.module + end for end in _ACTIVATIONS]
    return weights, ignored


def _describe(checkpoint: Checkpoint, weight: str) -> tuple[str, Mapping[str, Any]]:
    """Returns the class of a weight, and its attributes."""
    text = checkpoint.metadata.get(weight)
    if text is None:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata of its files do not describe {weight!r}, "
            "which torchao has quantised; save it again with torchao"
        )
    try:
        fields = parse_json(checkpoint.path, text.encode("utf-8", "replace"))
    except CheckpointError as error:
        error.add_note(f"This is what the metadata say of {weight!r}.")
        raise
    kind, data = fields.get("_type"), fields.get("_data")
    if kind not in _KINDS:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {weight!r} is a {str(kind)[:40]!r} of torchao; jaxbnb "
            f"reads {list(_KINDS)}. The layout of others depends on a kernel. Decode "
            "it with torchao, or load the original checkpoint with quant="
        )
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"{checkpoint.path}: the metadata of {weight!r} need a '_data' of "
            f"attributes; got {str(data)[:40]}"
        )
    return str(kind), data


def _make_weight(
    arrays: Arrays, kind: str, fields: Mapping[str, Any], is_symmetric: bool
) -> StoredWeight:
    is_float = kind == _FLOAT8
    rows, size = arrays.require("qdata", (E4M3,) if is_float else _INT8, (None, None))
    if arrays.info("act_pre_scale") is not None:
        raise UnsupportedCheckpointError(
            f"{arrays.checkpoint.path}: {arrays.module!r} has an act_pre_scale, which "
            "multiplies its inputs; jaxbnb does not do that. Load the original "
            "checkpoint with quant="
        )
    count, block_size = _find_blocks(arrays, fields, rows, size)
    grid = -(-rows // count), -(-size // block_size)
    arrays.require_size("scale", FLOATS, grid[0] * grid[1])
    has_zero = not is_float and arrays.info("zero_point") is not None
    if has_zero:
        arrays.require_size("zero_point", _INT8, grid[0] * grid[1])
    has_zero = has_zero and not is_symmetric
    is_int4 = kind == _INTX and _read_name(fields.get("target_dtype")) == "int4"
    bits = 4 if is_int4 else 8
    half = 2 ** (bits - 1)

    def read_integers(name: str) -> np.ndarray:
        """Returns integers, counted from the least that ``bits`` hold."""
        integers = arrays.read(name).astype(np.int16) + half
        if integers.min() < 0 or integers.max() >= 2 * half:
            raise arrays.fail(f"has a {name} that {bits} bits do not hold")
        return integers.astype(np.uint8)

    def read() -> dict[str, Any]:
        if is_float:
            codes = arrays.read("qdata").view(np.uint8)
        else:
            codes = read_integers("qdata")
        scales = arrays.read("scale").reshape(grid).astype(np.float32)
        zero = None
        if has_zero:
            zero = spread_rows(read_integers("zero_point").reshape(grid), count, rows)
        return {
            "codes": pack_nibbles(codes) if is_int4 else codes,
            "absmax": spread_rows(scales, count, rows),
            "zero_point": zero,
        }

    default = read_dtype(arrays.checkpoint, _BFLOAT16)
    dtype = DTYPES.get(_read_name(fields.get("dtype")), default)
    info = TensorInfo((rows, size), dtype)
    quant_type = "fp8_scaled" if is_float else _FORMATS[bits, has_zero]
    config = QuantConfig(quant_type, block_size)
    weight = hold(info, tuple(arrays.names), config, read)
    is_dynamic = _rounds_inputs(fields) and arrays.info(_ACTIVATIONS[0]) is None
    if quant_type == "int8_scaled" and grid == (rows, 1) and is_dynamic:
        return multiply_integers(weight)
    return weight


def _find_blocks(
    arrays: Arrays, fields: Mapping[str, Any], rows: int, size: int
) -> tuple[int, int]:
    """Returns how many rows, and how many elements of each, share a scale."""
    blocks = fields.get("block_size")
    if (
        not isinstance(blocks, list)
        or len(blocks) != 2
        or any(type(n) is not int or n < 1 for n in blocks)
        or rows % blocks[0]
        or size % blocks[1]
        or (blocks[1] % 2 and blocks[1] != size)
    ):
        raise arrays.fail(
            f"is a matrix of {rows} rows of {size}, which needs a block_size that "
            f"divides both, even along a row; got {str(blocks)[:40]}"
        )
    is_whole = blocks[1] == size
    return blocks[0], whole_axis_block_size(size) if is_whole else blocks[1]


def _rounds_inputs(fields: Mapping[str, Any]) -> bool:
    """Returns whether each token's inputs are rounded to 8 bits, around zero."""
    kwargs = fields.get("act_quant_kwargs")
    data = kwargs.get("_data") if isinstance(kwargs, Mapping) else None
    if not isinstance(data, Mapping):
        return False
    granularity, mapping = data.get("granularity"), data.get("mapping_type")
    return (
        isinstance(granularity, Mapping)
        and granularity.get("_type") == "PerRow"
        and _read_name(mapping) == "SYMMETRIC"
    )


def _read_name(value: Any) -> str:
    """Returns the name of a dtype, or of a choice, as torchao writes them."""
    return str(value.get("_data")) if isinstance(value, Mapping) else ""
