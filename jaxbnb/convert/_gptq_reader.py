"""Reads weights that GPTQ or AWQ quantised.

A module ``M`` has ``M.qweight``, ``M.qzeros`` and ``M.scales``, all with the axis
``in`` first, and an element is ``(code - zero) * scale``. GPTQ packs codes along
``in``, and AWQ along ``out`` in an order of its own. Version 1 of GPTQ stores zeros
less one. In GPTQ, ``M.g_idx`` says which group a row of ``in`` belongs to; after
"act-order", groups are not blocks.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._packing import pack_nibbles, unpack_words
from jaxbnb.convert._stored_weights import (
    FLOATS,
    INT32,
    Arrays,
    Found,
    StoredWeight,
    hold,
    read_dtype,
)
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import whole_axis_block_size

_BITS: Final = (4, 8)
# Where AWQ puts the eight codes of a word.
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)


def find_gptq(
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    _shapes: Mapping[str, np.ndarray],
) -> Found:
    """Returns the weights of a GPTQ checkpoint, and the tensors that none needs."""
    bits, group_size = _read_fields(checkpoint, fields, "gptq")
    version = fields.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: the checkpoint_format {str(version)[:40]!r} of GPTQ; "
            "jaxbnb reads 'gptq' and 'gptq_v2'. Save it again as one of them with "
            "gptqmodel"
        )
    if fields.get("dynamic"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: GPTQ with fields of their own for some layers "
            "('dynamic'), which jaxbnb does not read; gptqmodel loads it"
        )
    has_order = bool(fields.get("desc_act")) and group_size is not None
    is_symmetric = fields.get("sym", True) is True
    weights = {}
    for module in _find_modules(checkpoint):
        arrays = Arrays(checkpoint, module)
        words, rows = arrays.require("qweight", INT32, (None, None))
        size = words * 32 // bits
        groups = 1 if group_size is None else -(-size // group_size)
        arrays.require("qzeros", INT32, (groups, -(-rows * bits // 32)))
        arrays.require("scales", FLOATS, (groups, rows))
        scale_info = arrays.info("scales")
        if arrays.info("g_idx") is not None or has_order:
            arrays.require("g_idx", INT32, (size,))
        assert scale_info is not None
        dtype = read_dtype(checkpoint, scale_info.dtype)
        options = (arrays, bits, group_size, size, rows, version == "gptq")
        info = TensorInfo((rows, size), dtype)
        if has_order:
            weights[f"{module}weight"] = StoredWeight(
                info,
                tuple(arrays.names),
                functools.partial(_decode_ordered, *options, dtype),
                encoding=f"gptq, {bits} bits, act-order",
            )
            continue
        config = QuantConfig(
            f"int{bits}_scaled" if is_symmetric else f"uint{bits}",
            group_size or whole_axis_block_size(size),
        )
        read = functools.partial(_read_gptq, *options, is_symmetric)
        weights[f"{module}weight"] = hold(info, tuple(arrays.names), config, read)
    return weights, []


def find_awq(
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    _shapes: Mapping[str, np.ndarray],
) -> Found:
    """Returns the weights of an AWQ checkpoint, and the tensors that none needs."""
    bits, group_size = _read_fields(checkpoint, fields, "awq")
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if version != "gemm" or bits != 4:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: AWQ of version {version[:40]!r} in {bits} bits; "
            "jaxbnb reads 'gemm' in 4 bits. Save it again as that with AutoAWQ"
        )
    has_zero = fields.get("zero_point", True) is not False
    weights = {}
    for module in _find_modules(checkpoint):
        arrays = Arrays(checkpoint, module)
        size, words = arrays.require("qweight", INT32, (None, None))
        rows = words * 8
        groups = 1 if group_size is None else -(-size // group_size)
        if has_zero:
            arrays.require("qzeros", INT32, (groups, words))
        arrays.require("scales", FLOATS, (groups, rows))
        scale_info = arrays.info("scales")
        assert scale_info is not None
        info = TensorInfo((rows, size), read_dtype(checkpoint, scale_info.dtype))
        config = QuantConfig(
            "uint4" if has_zero else "int4_scaled",
            group_size or whole_axis_block_size(size),
        )
        weights[f"{module}weight"] = hold(
            info,
            tuple(arrays.names),
            config,
            functools.partial(_read_awq, arrays, has_zero),
        )
    return weights, [] if has_zero else _find(checkpoint, ".qzeros")


def _read_fields(
    checkpoint: Checkpoint, fields: Mapping[str, Any], method: str
) -> tuple[int, int | None]:
    """Returns bits, and the size of groups or None for whole rows."""
    bits = fields.get("bits", fields.get("w_bit", 4))
    group_size = fields.get("group_size", fields.get("q_group_size", 128))
    if type(bits) is not int or bits not in _BITS:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {method} in {str(bits)[:20]} bits; jaxbnb reads "
            f"{list(_BITS)}. Load the original checkpoint with quant="
        )
    is_size = type(group_size) is int and group_size > 0 and group_size % 2 == 0
    if not is_size and group_size != -1:
        raise CheckpointError(
            f"{checkpoint.path}: the group_size of {method} must be a positive even "
            f"number, or -1 for whole rows; got {str(group_size)[:20]}"
        )
    return bits, group_size if is_size else None


def _find_modules(checkpoint: Checkpoint) -> list[str]:
    return [n.removesuffix("qweight") for n in _find(checkpoint, ".qweight")]


def _find(checkpoint: Checkpoint, end: str) -> list[str]:
    return [name for name in checkpoint.tensors if name.endswith(end)]


def _unpack_gptq(
    arrays: Arrays, bits: int, size: int, rows: int, is_first_version: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes ``(out, in)``, and zeros and scales ``(out, groups)``."""
    codes = unpack_words(arrays.read("qweight").T, bits, size)
    zeros = unpack_words(arrays.read("qzeros"), bits, rows).T
    if is_first_version:
        zeros = zeros + np.uint8(1) & np.uint8(2**bits - 1)
    return codes, zeros, arrays.read("scales").T.astype(np.float32)


def _read_gptq(
    arrays: Arrays,
    bits: int,
    group_size: int | None,
    size: int,
    rows: int,
    is_first_version: bool,
    is_symmetric: bool,
) -> dict[str, Any]:
    codes, zeros, scales = _unpack_gptq(arrays, bits, size, rows, is_first_version)
    if arrays.info("g_idx") is not None:
        groups = np.arange(size) // (group_size or size)
        if not np.array_equal(arrays.read("g_idx"), groups):
            raise arrays.fail(
                "has a g_idx that is out of order, although the config has no desc_act"
            )
    if is_symmetric and np.any(zeros != 2 ** (bits - 1)):
        raise arrays.fail(
            f"has zero points other than {2 ** (bits - 1)}, although the config says "
            "it is symmetric ('sym')"
        )
    return {
        "codes": pack_nibbles(codes) if bits == 4 else codes,
        "absmax": np.ascontiguousarray(scales),
        "zero_point": None if is_symmetric else np.ascontiguousarray(zeros),
    }


def _decode_ordered(
    arrays: Arrays,
    bits: int,
    group_size: int,
    size: int,
    rows: int,
    is_first_version: bool,
    dtype: np.dtype,
) -> np.ndarray:
    """Decodes a weight with columns in groups of any order."""
    codes, zeros, scales = _unpack_gptq(arrays, bits, size, rows, is_first_version)
    groups = arrays.read("g_idx")
    if np.any((groups < 0) | (groups >= scales.shape[1])):
        raise arrays.fail(f"has a g_idx beyond its {scales.shape[1]} groups")
    levels = codes.astype(np.float32) - zeros[:, groups].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (levels * scales[:, groups]).astype(dtype)


def _read_awq(arrays: Arrays, has_zero: bool) -> dict[str, Any]:
    codes, zeros = _unpack_awq(arrays.read("qweight")), None
    if has_zero:
        zeros = np.ascontiguousarray(_unpack_awq(arrays.read("qzeros")).T)
    return {
        "codes": pack_nibbles(codes.T),
        "absmax": np.ascontiguousarray(arrays.read("scales").T, np.float32),
        "zero_point": zeros,
    }


def _unpack_awq(words: np.ndarray) -> np.ndarray:
    stored = unpack_words(words, 4, 8 * words.shape[-1])
    order = np.arange(stored.shape[-1]).reshape(-1, 8)[:, _AWQ_ORDER].reshape(-1)
    return stored[..., order]
