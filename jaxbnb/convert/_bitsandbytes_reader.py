"""Reads weights that bitsandbytes quantised, as one tensor each."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbnb.convert._bitsandbytes_weights import (
    CODEBOOKS,
    DTYPES,
    MAX_STATE_BYTES,
    NESTED_BLOCK_SIZE,
    STATE_INFIX,
    TRANSPOSED_MODELS,
)
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._stored_weights import StoredWeight, decode, present
from jaxbnb.convert.json_files import parse_json
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.formats import LLM_INT8
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED


def find_states(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names of the states of 4-bit weights, for `merge_parts`."""
    return [
        name
        for name, info in tensors.items()
        if STATE_INFIX in name and info.nbytes <= MAX_STATE_BYTES
    ]


def merge_parts(checkpoint: Checkpoint, states: Mapping[str, np.ndarray]) -> Checkpoint:
    """Presents each quantised weight of a checkpoint as one tensor.

    Args:
        checkpoint: tensors as they are stored.
        states: arrays of the tensors that `find_states` names.

    Returns:
        The new checkpoint, or the same one if no weight is quantised.

    Raises:
        CheckpointError: arrays of a weight are missing or contradict its state.
        UnsupportedCheckpointError: a weight is in a form that jaxbnb does not read.
    """
    tensors = checkpoint.tensors
    weights: dict[str, _Weight] = {}
    for name in tensors:
        weight, state, quant_type = name.rpartition(STATE_INFIX)
        if state:
            weights[weight] = _check_4bit(checkpoint, weight, quant_type, states)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            weights[weight] = _check_8bit(checkpoint, weight)
    if not weights:
        return checkpoint
    if checkpoint.config.get("model_type") in TRANSPOSED_MODELS:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: bitsandbytes transposes the weights of a "
            f"{checkpoint.config['model_type']} before it quantises them, and jaxbnb "
            "does not read these; load the original checkpoint instead"
        )
    options = _read_options(checkpoint)
    return present(
        checkpoint,
        {
            name: StoredWeight(
                weight.info,
                weight.parts,
                functools.partial(_read, checkpoint, weight, name),
                _make_config(weight, options),
                functools.partial(_read_quantized, checkpoint, weight, name),
            )
            for name, weight in weights.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A quantised weight of a file.

    Attributes:
        info: shape and dtype before it was quantised.
        parts: names of its arrays.
        quant_type: "nf4", "fp4" or "llm_int8".
        block_size: elements in a block; None for llm_int8.
        offset: mean of a doubly quantised absmax, else None.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    quant_type: str
    block_size: int | None = None
    offset: float | None = None


def _check_4bit(
    checkpoint: Checkpoint,
    name: str,
    quant_type: str,
    states: Mapping[str, np.ndarray],
) -> _Weight:
    where = f"{checkpoint.path}: the weight {name!r}"
    if quant_type not in CODEBOOKS:
        raise UnsupportedCheckpointError(
            f"{where} is quantised to {quant_type!r}; jaxbnb reads {list(CODEBOOKS)}"
        )
    key = f"{name}{STATE_INFIX}{quant_type}"
    fields = _parse_state(checkpoint, key, states)
    shape: Any = fields.get("shape")
    block_size: Any = fields.get("blocksize")
    if not _is_shape(shape) or not _is_size(block_size, 2**20) or block_size % 2:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must have a shape of one to four axes and an "
            f"even blocksize, got {str(shape)[:60]} and {str(block_size)[:20]}"
        )
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None or fields.get("quant_type") != quant_type:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must name quant_type {quant_type!r} and a "
            f"dtype from {list(DTYPES)}, got {str(fields)[:160]}"
        )
    offset = _read_offset(checkpoint, key, fields)
    size = math.prod(shape)
    blocks = -(-size // block_size)
    float32 = np.dtype(np.float32)
    absmax_dtype = float32 if offset is None else np.dtype(np.uint8)
    parts = {
        f"{name}.absmax": (blocks, absmax_dtype),
        f"{name}.quant_map": (16, float32),
    }
    if offset is not None:
        parts[f"{name}.nested_absmax"] = (-(-blocks // NESTED_BLOCK_SIZE), float32)
        parts[f"{name}.nested_quant_map"] = (256, float32)
    _check_parts(checkpoint, name, parts)
    packed = checkpoint.tensors[name].nbytes if name in checkpoint.tensors else None
    # The codes may have any dtype, the ``quant_storage``, so an odd byte is padded.
    if packed is None or not 0 <= packed - (size + 1) // 2 < 8:
        raise CheckpointError(
            f"{where} of shape {shape} takes {(size + 1) // 2:,} bytes; the file has "
            f"{'none' if packed is None else format(packed, ',')}"
        )
    info = TensorInfo(tuple(shape), dtype)
    return _Weight(info, (*parts, key, name), quant_type, block_size, offset)


def _check_8bit(checkpoint: Checkpoint, name: str) -> _Weight:
    where = f"{checkpoint.path}: the weight {name!r}"
    info = checkpoint.tensors.get(name)
    if info is None or info.dtype != np.int8 or len(info.shape) != 2:
        raise CheckpointError(
            f"{where} has scales, so it must be an int8 matrix; it is "
            f"{'missing' if info is None else f'{info.dtype}{list(info.shape)}'}"
        )
    module = name.removesuffix("weight")
    parts = {f"{module}SCB": (info.shape[0], np.dtype(np.float32))}
    _check_parts(checkpoint, name, parts)
    format_name = f"{module}weight_format"
    if format_name in checkpoint.tensors:
        format_info = checkpoint.tensors[format_name]
        code = checkpoint.read(format_name) if format_info.nbytes <= 8 else None
        if code is None or code.size != 1 or code.item() != 0:
            raise UnsupportedCheckpointError(
                f"{where} has the weight_format {code}; jaxbnb reads only 0, by rows. "
                "Save it again with a bitsandbytes version from 2025"
            )
    dtype = DTYPES.get(
        str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")),
        # bitsandbytes casts weights to this before it quantises them.
        np.dtype(np.float16),
    )
    names = (*parts, format_name, name)
    return _Weight(TensorInfo(info.shape, dtype), names, LLM_INT8)


def _parse_state(
    checkpoint: Checkpoint, key: str, states: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    info = checkpoint.tensors[key]
    if info.dtype != np.uint8 or info.nbytes > MAX_STATE_BYTES:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must be the bytes of a text, at most "
            f"{MAX_STATE_BYTES}; it is {info.dtype}{list(info.shape)}"
        )
    try:
        return parse_json(checkpoint.path, states[key].tobytes())
    except CheckpointError as error:
        error.add_note(f"This is the text of {key!r}.")
        raise


def _read_offset(
    checkpoint: Checkpoint, key: str, fields: dict[str, Any]
) -> float | None:
    """Returns the offset of a doubly quantised absmax, or None for a plain one."""
    nested = [fields.get(f"nested_{name}") for name in ("blocksize", "dtype", "offset")]
    if nested == [None, None, None]:
        return None
    size, dtype, offset = nested
    if size != NESTED_BLOCK_SIZE or dtype != "float32" or type(offset) is not float:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {key!r} has nested blocksize, dtype and offset "
            f"{str(nested)[:80]}; jaxbnb reads {NESTED_BLOCK_SIZE}, 'float32' and a "
            "number"
        )
    return offset


def _check_parts(
    checkpoint: Checkpoint, name: str, parts: Mapping[str, tuple[int, np.dtype]]
) -> None:
    problems = []
    for part, (size, dtype) in parts.items():
        info = checkpoint.tensors.get(part)
        if info is None:
            problems.append(f"{part} is missing")
        elif math.prod(info.shape) != size or info.dtype != dtype:
            got = f"{info.dtype}{list(info.shape)}"
            problems.append(f"{part} is {got}, not {dtype}[{size}]")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: the quantised weight {name!r} is incomplete: "
            + "; ".join(problems)
        )


def _read_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns options of the product, which are only in the config."""
    fields = checkpoint.config.get("quantization_config")
    if not isinstance(fields, Mapping):
        return {}
    try:
        config, _ = QuantConfig.from_huggingface(fields)
    except NotImplementedError as error:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} has weights that bitsandbytes quantised, but its "
            f"quantization_config: {error}"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its quantization_config: {error}"
        ) from error
    if config.quant_type == LLM_INT8:
        return {"outlier_threshold": config.outlier_threshold}
    return {"compute_dtype": config.compute_dtype}


def _make_config(weight: _Weight, options: dict[str, Any]) -> QuantConfig:
    if weight.quant_type == LLM_INT8:
        threshold = options.get("outlier_threshold")
        return QuantConfig(LLM_INT8, outlier_threshold=threshold)
    return QuantConfig(
        weight.quant_type,
        weight.block_size,
        weight.offset is not None,
        compute_dtype=options.get("compute_dtype"),
    )


def _read_quantized(
    checkpoint: Checkpoint, weight: _Weight, name: str
) -> QuantizedArray:
    rows, *others = weight.info.shape
    size = others[0] if len(others) == 1 else 0
    if len(others) != 1 or (weight.block_size and size % weight.block_size):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {name!r} of shape {weight.info.shape} is quantised in "
            f"blocks of {weight.block_size} that run across the ends of its rows, "
            "which jaxbnb's layers do not support. Convert the checkpoint with a "
            "dtype, which decodes it, and quantise it again"
        )
    return _read_matrix(checkpoint, weight, name, rows, size)


def _read_matrix(
    checkpoint: Checkpoint, weight: _Weight, name: str, rows: int, size: int
) -> QuantizedArray:
    """Reads the arrays of a weight as those of a kernel ``(size, rows)``."""
    # These are NumPy's arrays, which jaxtyping's Array does not include.
    codes: Any
    absmax: Any
    nested: Any = None
    offset: Any = None
    if weight.quant_type == LLM_INT8:
        scales = checkpoint.read(f"{name.removesuffix('weight')}SCB")
        codes, absmax = checkpoint.read(name), scales.reshape(rows, 1)
        # An empty row has no block.
        absmax = absmax[:, :size]
        block_size = max(2, size + size % 2)
    else:
        _check_codebook(checkpoint, f"{name}.quant_map", CODEBOOKS[weight.quant_type])
        raw = np.ascontiguousarray(checkpoint.read(name)).reshape(-1).view(np.uint8)
        codes = raw[: (rows * size + 1) // 2].reshape(rows, -1)
        absmax = checkpoint.read(f"{name}.absmax").reshape(rows, -1)
        assert weight.block_size is not None
        block_size = weight.block_size
    if weight.offset is not None:
        _check_codebook(checkpoint, f"{name}.nested_quant_map", DYNAMIC8_SIGNED)
        nested = checkpoint.read(f"{name}.nested_absmax").reshape(-1)
        offset = np.asarray(weight.offset, np.float32)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        nested_absmax=nested,
        offset=offset,
        quant_type=weight.quant_type,
        block_size=block_size,
        axis=-2,
        axis_size=size,
        dtype=weight.info.dtype,
    )


def _check_codebook(checkpoint: Checkpoint, name: str, codebook: np.ndarray) -> None:
    # A weight with other levels would decode to other values.
    if not np.array_equal(checkpoint.read(name).reshape(-1), codebook):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: the levels of {name!r} are not bitsandbytes' own"
        )


def _read(checkpoint: Checkpoint, weight: _Weight, name: str) -> np.ndarray:
    """Decodes a quantised weight to ``(out, in)``."""
    shape = weight.info.shape
    # As a single row, a weight may have blocks that run across the ends of rows.
    rows = shape[0] if weight.quant_type == LLM_INT8 else 1
    q = _read_matrix(checkpoint, weight, name, rows, math.prod(shape) // max(rows, 1))
    return decode(lambda: q).reshape(shape)


def _is_size(value: Any, largest: int) -> bool:
    return type(value) is int and 0 < value <= largest


def _is_shape(value: Any) -> bool:
    # The product of the sizes is compared with the bytes of the file later.
    is_list = isinstance(value, list) and 1 <= len(value) <= 4
    return is_list and all(_is_size(size, 2**40) for size in value)
