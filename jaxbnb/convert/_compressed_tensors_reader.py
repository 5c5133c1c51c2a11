"""Reads weights that compressed-tensors stores, as llm-compressor writes them.

A module ``M`` has ``M.weight`` or ``M.weight_packed``, ``M.weight_scale``, and if its
format has them ``M.weight_zero_point``, ``M.weight_global_scale``, ``M.weight_shape``
and ``M.weight_g_idx``. The config says how they are to be read, for groups of modules.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._fp8_reader import E4M3, is_block_size, spread_rows
from jaxbnb.convert._packing import pack_nibbles, swap_nibbles, unpack_words
from jaxbnb.convert._stored_weights import (
    FLOATS,
    INT32,
    Arrays,
    Found,
    StoredWeight,
    hold,
    multiply_integers,
    read_dtype,
)
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import SCALED, whole_axis_block_size

_INT8, _UINT8 = (np.dtype(np.int8),), (np.dtype(np.uint8),)
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_SHAPE: Final = ".weight_shape"
_PACKED_FLOATS: Final = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}
FORMATS: Final = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *_PACKED_FLOATS,
)
# Scales that are fixed for what weights are multiplied with. Here, that is not rounded.
_ACTIVATIONS: Final = re.compile(
    r".*\.((input|output)_(scale|zero_point|global_scale)|[kqv]_(scale|zero_point))"
)
# Names that show a quantised module.
_WEIGHTS: Final = (".weight_packed", ".weight_scale")


def find_shapes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names of the shapes of packed weights."""
    return [
        name
        for name, info in tensors.items()
        if name.endswith(_SHAPE) and info.nbytes <= 64
    ]


def find_weights(
    checkpoint: Checkpoint, fields: Mapping[str, Any], shapes: Mapping[str, np.ndarray]
) -> Found:
    """Returns the weights of a checkpoint, and the tensors that none needs."""
    groups = fields.get("config_groups")
    sparsity = fields.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: compressed-tensors with the sparse format "
            f"{str(sparsity['format'])[:40]!r}; jaxbnb reads dense weights, so "
            "decompress it with compressed-tensors first"
        )
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, Mapping) for group in groups.values()
    ):
        raise CheckpointError(
            f"{checkpoint.path}: compressed-tensors needs config_groups in its "
            f"quantization_config; got {str(groups)[:80]}"
        )
    weights: dict[str, StoredWeight] = {}
    for name in checkpoint.tensors:
        end = next((end for end in _WEIGHTS if name.endswith(end)), None)
        module = "" if end is None else name.removesuffix(end)
        if end is None or f"{module}.weight" in weights:
            continue
        group = _find_group(checkpoint, groups, module)
        arrays = Arrays(checkpoint, f"{module}.")
        weights[f"{module}.weight"] = _make_weight(
            arrays, group.get("format") or fields.get("format"), group, shapes
        )
    ignored = [name for name in checkpoint.tensors if _ACTIVATIONS.fullmatch(name)]
    return weights, ignored


def _find_group(
    checkpoint: Checkpoint, groups: Mapping[str, Any], module: str
) -> Mapping[str, Any]:
    """Returns the group of a config that a module belongs to.

    A name, or a regular expression for one, comes before the class of modules.
    """
    by_class = None
    for group in groups.values():
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if not isinstance(target, str):
                continue
            if target == module or _matches(checkpoint, target, module):
                return group
            # All classes but those of convolutions are linear layers.
            is_class = target.isidentifier() and target[:1].isupper()
            if is_class and not target.startswith("Conv"):
                by_class = group if by_class is None else by_class
    if by_class is None:
        raise CheckpointError(
            f"{checkpoint.path}: {module!r} is quantised, but no group in the config "
            "of compressed-tensors targets it"
        )
    return by_class


def _matches(checkpoint: Checkpoint, target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise CheckpointError(
            f"{checkpoint.path}: the target {target[:80]!r} of compressed-tensors is "
            f"not a regular expression: {error}"
        ) from error


def _make_weight(
    arrays: Arrays,
    format_: Any,
    group: Mapping[str, Any],
    shapes: Mapping[str, np.ndarray],
) -> StoredWeight:
    fields = group.get("weights")
    if format_ not in FORMATS or not isinstance(fields, Mapping):
        name = arrays.module.rstrip(".")
        raise UnsupportedCheckpointError(
            f"{arrays.checkpoint.path}: {name!r} is stored in the format "
            f"{str(format_)[:40]!r} of compressed-tensors; jaxbnb reads "
            f"{list(FORMATS)}. Decompress it with compressed-tensors, or load the "
            "original checkpoint with quant="
        )
    if format_ in _PACKED_FLOATS:
        return _make_packed_floats(arrays, _PACKED_FLOATS[format_])
    kind, bits = fields.get("type", "int"), fields.get("num_bits", 8)
    if kind == "float" and bits == 8 and format_ != "pack-quantized":
        rows, size = arrays.require("weight", (E4M3,), (None, None))
        return _make_scaled(arrays, fields, "fp8_scaled", rows, size, _read_bytes)
    is_symmetric = fields.get("symmetric", True) is not False
    if kind == "int" and bits in (4, 8):
        quant_type = f"int{bits}_scaled" if is_symmetric else f"uint{bits}"
        if format_ == "pack-quantized":
            rows, size = _require_packed(arrays, bits, shapes)
            read = functools.partial(_read_words, bits=bits, size=size)
            return _make_scaled(arrays, fields, quant_type, rows, size, read)
        if bits == 8:
            rows, size = arrays.require("weight", _INT8, (None, None))
            made = _make_scaled(arrays, fields, quant_type, rows, size, _read_int8)
            is_one_row = is_symmetric and fields.get("strategy") == "channel"
            if is_one_row and _rounds_inputs(group):
                return multiply_integers(made)
            return made
    raise UnsupportedCheckpointError(
        f"{arrays.checkpoint.path}: compressed-tensors with {str(bits)[:20]} bits of "
        f"the type {str(kind)[:20]!r} in the format {format_!r}; jaxbnb reads integers "
        "of 4 and 8 bits and floats of 8. Load the original checkpoint with quant="
    )


def _make_packed_floats(arrays: Arrays, quant_type: str) -> StoredWeight:
    """Two codes of E2M1 per byte, the first one in the low nibble."""
    rows, stored = arrays.require("weight_packed", _UINT8, (None, None))
    size, block_size = 2 * stored, SCALED[quant_type].block_size
    blocks = rows, -(-size // block_size)
    if quant_type == "nvfp4":
        arrays.require("weight_scale", (E4M3,), blocks)
        arrays.require_size("weight_global_scale", (np.dtype(np.float32),), 1)
    else:
        arrays.require("weight_scale", _UINT8, blocks)

    def read() -> dict[str, Any]:
        parts: dict[str, Any] = {
            "codes": swap_nibbles(arrays.read("weight_packed")),
            "absmax": arrays.read("weight_scale").view(np.uint8),
        }
        if quant_type == "nvfp4":
            parts["nested_absmax"] = arrays.read("weight_global_scale").reshape(1)
        return parts

    info = TensorInfo((rows, size), read_dtype(arrays.checkpoint, _BFLOAT16))
    return hold(info, tuple(arrays.names), QuantConfig(quant_type), read)


def _require_packed(
    arrays: Arrays, bits: int, shapes: Mapping[str, np.ndarray]
) -> tuple[int, int]:
    """Returns the shape of a weight that is packed into words."""
    rows, words = arrays.require("weight_packed", INT32, (None, None))
    arrays.require_size("weight_shape", (np.dtype(np.int64), *INT32), 2)
    shape = shapes.get(f"{arrays.module}weight_shape")
    size = 0 if shape is None else int(shape.reshape(-1)[1])
    is_same = shape is not None and shape.reshape(-1)[0] == rows
    if not is_same or size < 1 or -(-size * bits // 32) != words:
        got = None if shape is None else shape.tolist()
        raise arrays.fail(
            f"has the weight_shape {got}, but {rows} rows of {words} words of "
            f"{32 // bits} codes"
        )
    return rows, size


def _make_scaled(
    arrays: Arrays,
    fields: Mapping[str, Any],
    quant_type: str,
    rows: int,
    size: int,
    read_codes: Callable[[Arrays], np.ndarray],
) -> StoredWeight:
    """A weight with a scale for each block, row, or for all of it."""
    count, block_size = _find_blocks(arrays, fields, rows, size)
    grid = -(-rows // count), -(-size // block_size)
    if grid == (1, 1):
        arrays.require_size("weight_scale", FLOATS, 1)
    else:
        arrays.require("weight_scale", FLOATS, grid)
    has_zero = SCALED[quant_type].has_zero_point
    bits = SCALED[quant_type].bits
    # The zero points of groups and channels are packed as the codes are.
    is_packed = has_zero and arrays.info("weight_packed") is not None and count == 1
    if is_packed:
        words = -(-rows * bits // 32)
        arrays.require("weight_zero_point", INT32, (words, grid[1]))
    elif has_zero:
        arrays.require_size("weight_zero_point", _INT8, grid[0] * grid[1])
    has_order = arrays.info("weight_g_idx") is not None
    if has_order:
        arrays.require("weight_g_idx", INT32, (size,))

    def read_scales() -> tuple[np.ndarray, np.ndarray | None]:
        scales = arrays.read("weight_scale").reshape(grid).astype(np.float32)
        if not has_zero:
            return spread_rows(scales, count, rows), None
        zero = arrays.read("weight_zero_point")
        if is_packed:
            zero = np.ascontiguousarray(unpack_words(zero.T, bits, rows).T)
        else:
            half = np.uint8(2 ** (bits - 1))
            zero = zero.reshape(grid).view(np.uint8) + half
            zero = spread_rows(zero, count, rows)
        return spread_rows(scales, count, rows), zero

    def read() -> dict[str, Any]:
        codes, (scales, zero) = read_codes(arrays), read_scales()
        codes = pack_nibbles(codes) if bits == 4 else codes
        return {"codes": codes, "absmax": scales, "zero_point": zero}

    def decode_ordered() -> np.ndarray:
        groups = arrays.read("weight_g_idx")
        if np.any((groups < 0) | (groups >= grid[1])):
            raise arrays.fail(f"has a weight_g_idx beyond its {grid[1]} groups")
        scales, zero = read_scales()
        levels = read_codes(arrays).astype(np.float32)
        if zero is None:
            levels -= np.float32(2 ** (bits - 1))
        else:
            levels -= zero[:, groups].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return (levels * scales[:, groups]).astype(info.dtype)

    scale_info = arrays.info("weight_scale")
    assert scale_info is not None
    info = TensorInfo((rows, size), read_dtype(arrays.checkpoint, scale_info.dtype))
    parts = tuple(arrays.names)
    if has_order:
        encoding = f"compressed-tensors, {bits} bits, act-order"
        return StoredWeight(info, parts, decode_ordered, encoding=encoding)
    return hold(info, parts, QuantConfig(quant_type, block_size), read)


def _rounds_inputs(group: Mapping[str, Any]) -> bool:
    """Returns whether each token's inputs are rounded to 8 bits, as they come."""
    inputs = group.get("input_activations")
    want = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    return (
        isinstance(inputs, Mapping)
        and want.items() <= {"type": "int", **inputs}.items()
        and inputs.get("symmetric", True) is not False
    )


def _find_blocks(
    arrays: Arrays, fields: Mapping[str, Any], rows: int, size: int
) -> tuple[int, int]:
    """Returns how many rows, and how many elements of each, share a scale."""
    strategy: Any = fields.get("strategy")
    group_size: Any = fields.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size in (None, 0) else "group"
        strategy = "channel" if group_size == -1 else strategy
    whole = whole_axis_block_size(size)
    if strategy == "group":
        if not is_block_size(group_size):
            raise arrays.fail(
                f"has groups of {str(group_size)[:20]}; jaxbnb needs a positive even "
                "number"
            )
        return 1, int(cast(int, group_size))
    if strategy == "block":
        structure = fields.get("block_structure")
        if (
            not isinstance(structure, list)
            or len(structure) != 2
            or not all(map(is_block_size, structure))
        ):
            raise arrays.fail(
                "needs a block_structure of two positive even numbers in the config; "
                f"got {str(structure)[:40]}"
            )
        return int(structure[0]), int(structure[1])
    if strategy == "tensor":
        return rows, whole
    if strategy == "channel":
        return 1, whole
    raise UnsupportedCheckpointError(
        f"{arrays.checkpoint.path}: compressed-tensors with the strategy "
        f"{str(strategy)[:40]!r}; jaxbnb reads tensor, channel, group and block. "
        "Load the original checkpoint with quant="
    )


def _read_bytes(arrays: Arrays) -> np.ndarray:
    return arrays.read("weight").view(np.uint8)


def _read_int8(arrays: Arrays) -> np.ndarray:
    """Returns codes that count from the lowest integer."""
    return arrays.read("weight").view(np.uint8) + np.uint8(128)


def _read_words(arrays: Arrays, *, bits: int, size: int) -> np.ndarray:
    return unpack_words(arrays.read("weight_packed"), bits, size)
