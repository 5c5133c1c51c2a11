"""Weights as bitsandbytes stores them, in 4 and 8 bits, and the arrays of ours.

Of a weight ``W`` in 4 bits there are its packed codes under its own name, ``W.absmax``,
``W.quant_map``, the codebook, ``W.nested_absmax`` and ``W.nested_quant_map`` where the
absmax is quantised too, and ``W.quant_state.bitsandbytes__nf4`` (or ``__fp4``), the
text of a JSON object. In 8 bits, of a module ``M``: ``M.weight``, ``M.SCB``,
``M.weight_format``. Blocks run along the rows of a weight ``(out, in)``, as ours do
along the first axis of a kernel ``(in, out)``: the arrays are the same.
"""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Final

import jax
import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert.json_files import parse_json
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.parts import check_parts
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, FP4, NF4

_CODEBOOKS: Final = {"nf4": NF4, "fp4": FP4}
_NESTED_BLOCK: Final = 256
_STATE: Final = ".quant_state.bitsandbytes__"
_DTYPES: Final = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# A state is some 150 bytes.
_MAX_STATE_BYTES: Final = 4096
# Whose linear layers are stored the other way round, (in, out), unless quantised.
TRANSPOSED_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def states(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the small states of 4-bit weights, which `present` takes."""
    return [
        name
        for name, info in tensors.items()
        if _STATE in name and info.nbytes <= _MAX_STATE_BYTES
    ]


def present(checkpoint: Checkpoint, held: Mapping[str, np.ndarray]) -> Checkpoint:
    """The checkpoint with each quantised weight as one tensor; itself if it has none.

    Args:
        checkpoint: of the tensors as they are stored.
        held: those that `states` names.

    Raises:
        CheckpointError: arrays of a weight are missing or contradict its state.
        UnsupportedCheckpointError: a form of them that jaxbnb does not read.
    """
    tensors = checkpoint.tensors
    weights: dict[str, _Weight] = {}
    for name in tensors:
        weight, state, quant_type = name.rpartition(_STATE)
        if state:
            weights[weight] = _weight_4bit(checkpoint, weight, quant_type, held)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            weights[weight] = _weight_8bit(checkpoint, weight)
    if not weights:
        return checkpoint
    if checkpoint.config.get("model_type") in TRANSPOSED_MODELS:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: bitsandbytes turns the weights of a "
            f"{checkpoint.config['model_type']} round before it quantises them; jaxbnb "
            "reads the checkpoint that it was made from"
        )
    parts = {part for weight in weights.values() for part in weight.parts}
    options = _options(checkpoint)
    return Checkpoint(
        path=checkpoint.path,
        config=checkpoint.config,
        tensors=types.MappingProxyType(
            {
                name: weights[name].info if name in weights else info
                for name, info in tensors.items()
                if name in weights or name not in parts
            }
        ),
        reader=functools.partial(_read, checkpoint, weights),
        quantized=types.MappingProxyType(
            {name: _config(weight, options) for name, weight in weights.items()}
        ),
        quantized_reader=functools.partial(_read_quantized, checkpoint, weights),
        stored=checkpoint,
    )


def infos(name: str, info: TensorInfo, config: QuantConfig) -> dict[str, TensorInfo]:
    """What is stored of a weight ``(out, in)`` quantised to ``config``.

    The JSON of its state is padded with spaces, so that its length is known before the
    values are.
    """
    rows, size = info.shape
    uint8, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    if config.quant_type == LLM_INT8:
        module = name.removesuffix("weight")
        return {
            name: TensorInfo(info.shape, np.dtype(np.int8)),
            f"{module}SCB": TensorInfo((rows,), float32),
            f"{module}weight_format": TensorInfo((), uint8),
        }
    assert config.block_size is not None
    blocks = rows * size // config.block_size
    found = {
        f"{name}.absmax": TensorInfo(
            (blocks,), uint8 if config.double_quant else float32
        ),
        f"{name}.quant_map": TensorInfo((16,), float32),
    }
    if config.double_quant:
        nested = -(-blocks // _NESTED_BLOCK)
        found[f"{name}.nested_absmax"] = TensorInfo((nested,), float32)
        found[f"{name}.nested_quant_map"] = TensorInfo((256,), float32)
    # 24 bytes are the longest that a float's repr can be.
    text = _state(info, config, offset=-1.2345678901234567e-300)
    found[f"{name}{_STATE}{config.quant_type}"] = TensorInfo((len(text),), uint8)
    found[name] = TensorInfo((rows * size // 2, 1), uint8)
    return found


def arrays(name: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    """The arrays that `infos` announces, of a quantised kernel ``(in, out)``."""
    check_parts(q)
    size, rows = q.shape
    codes, absmax = np.asarray(q.codes), np.asarray(q.absmax)
    if q.quant_type == LLM_INT8:
        module = name.removesuffix("weight")
        return {
            name: codes,
            f"{module}SCB": absmax.reshape(-1),
            f"{module}weight_format": np.zeros((), np.uint8),
        }
    info = TensorInfo((rows, size), np.dtype(q.dtype))
    config = QuantConfig(q.quant_type, q.block_size, q.double_quant)
    offset = None if q.offset is None else float(q.offset)
    found = {
        f"{name}.absmax": absmax.reshape(-1),
        f"{name}.quant_map": _CODEBOOKS[q.quant_type],
    }
    if q.nested_absmax is not None:
        found[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax).reshape(-1)
        found[f"{name}.nested_quant_map"] = DYNAMIC8_SIGNED
    key = f"{name}{_STATE}{q.quant_type}"
    length = infos(name, info, config)[key].shape[0]
    text = _state(info, config, offset).ljust(length)
    found[key] = np.frombuffer(text, np.uint8)
    found[name] = codes.reshape(-1, 1)
    return found


def _state(info: TensorInfo, config: QuantConfig, offset: float | None) -> bytes:
    fields: dict[str, Any] = {
        "quant_type": config.quant_type,
        "blocksize": config.block_size,
        "dtype": info.dtype.name,
        "shape": list(info.shape),
    }
    if config.double_quant:
        fields |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return json.dumps(fields).encode()


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A quantised weight of a file.

    Attributes:
        info: shape and dtype of what was quantised.
        parts: the names of its arrays.
        quant_type: "nf4", "fp4" or "llm_int8".
        block_size: None for llm_int8.
        offset: the mean of a doubly quantised absmax, else None.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    quant_type: str
    block_size: int | None = None
    offset: float | None = None


def _weight_4bit(
    checkpoint: Checkpoint,
    name: str,
    quant_type: str,
    held: Mapping[str, np.ndarray],
) -> _Weight:
    where = f"{checkpoint.path}: the weight {name!r}"
    if quant_type not in _CODEBOOKS:
        raise UnsupportedCheckpointError(
            f"{where} is quantised to {quant_type!r}; jaxbnb reads {list(_CODEBOOKS)}"
        )
    key = f"{name}{_STATE}{quant_type}"
    fields = _fields(checkpoint, key, held)
    shape: Any = fields.get("shape")
    block_size: Any = fields.get("blocksize")
    if not _is_shape(shape) or not _is_size(block_size, 2**20) or block_size % 2:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must have a shape of one to four axes and an "
            f"even blocksize, got {str(shape)[:60]} and {str(block_size)[:20]}"
        )
    dtype = _DTYPES.get(str(fields.get("dtype")))
    if dtype is None or fields.get("quant_type") != quant_type:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must name quant_type {quant_type!r} and a "
            f"dtype of {list(_DTYPES)}, got {str(fields)[:160]}"
        )
    offset = _offset(checkpoint, key, fields)
    size = math.prod(shape)
    blocks = -(-size // block_size)
    float32 = np.dtype(np.float32)
    absmax_dtype = float32 if offset is None else np.dtype(np.uint8)
    parts = {
        f"{name}.absmax": (blocks, absmax_dtype),
        f"{name}.quant_map": (16, float32),
    }
    if offset is not None:
        parts[f"{name}.nested_absmax"] = (-(-blocks // _NESTED_BLOCK), float32)
        parts[f"{name}.nested_quant_map"] = (256, float32)
    _check_parts(checkpoint, name, parts)
    packed = checkpoint.tensors[name].nbytes if name in checkpoint.tensors else None
    # As bytes, or as whatever dtype ``quant_storage`` was: an odd byte is padded.
    if packed is None or not 0 <= packed - (size + 1) // 2 < 8:
        raise CheckpointError(
            f"{where} of shape {shape} takes {(size + 1) // 2:,} bytes; the file has "
            f"{'none' if packed is None else format(packed, ',')}"
        )
    info = TensorInfo(tuple(shape), dtype)
    return _Weight(info, (*parts, key, name), quant_type, block_size, offset)


def _weight_8bit(checkpoint: Checkpoint, name: str) -> _Weight:
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
                f"{where} has the weight_format {code}; jaxbnb reads 0, rows. Save it "
                "again with a bitsandbytes of 2025"
            )
    dtype = _DTYPES.get(
        str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")),
        # What bitsandbytes casts weights to before it quantises them.
        np.dtype(np.float16),
    )
    held = (*parts, format_name, name)
    return _Weight(TensorInfo(info.shape, dtype), held, LLM_INT8)


def _fields(
    checkpoint: Checkpoint, key: str, held: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    info = checkpoint.tensors[key]
    if info.dtype != np.uint8 or info.nbytes > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"{checkpoint.path}: {key!r} must be the bytes of a text, at most "
            f"{_MAX_STATE_BYTES}; it is {info.dtype}{list(info.shape)}"
        )
    try:
        return parse_json(checkpoint.path, held[key].tobytes())
    except CheckpointError as error:
        error.add_note(f"This is the text of {key!r}.")
        raise


def _offset(checkpoint: Checkpoint, key: str, fields: dict[str, Any]) -> float | None:
    nested = [fields.get(f"nested_{name}") for name in ("blocksize", "dtype", "offset")]
    if nested == [None, None, None]:
        return None
    block_size, dtype, offset = nested
    if block_size != _NESTED_BLOCK or dtype != "float32" or type(offset) is not float:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {key!r} has nested blocksize, dtype and offset "
            f"{str(nested)[:80]}; jaxbnb reads {_NESTED_BLOCK}, 'float32' and a number"
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


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a config says of the products, which no array does."""
    fields = checkpoint.config.get("quantization_config")
    if not isinstance(fields, Mapping):
        return {}
    try:
        config, _ = QuantConfig.from_huggingface(fields)
    except (ValueError, TypeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        raise CheckpointError(
            f"{checkpoint.path}: its quantization_config: {error}"
        ) from error
    if config.quant_type == LLM_INT8:
        return {"outlier_threshold": config.outlier_threshold}
    return {"compute_dtype": config.compute_dtype}


def _config(weight: _Weight, options: dict[str, Any]) -> QuantConfig:
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
    checkpoint: Checkpoint, weights: Mapping[str, _Weight], name: str
) -> QuantizedArray:
    weight = weights[name]
    rows, *others = weight.info.shape
    size = others[0] if len(others) == 1 else 0
    if len(others) != 1 or (weight.block_size and size % weight.block_size):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: {name!r} of shape {weight.info.shape} is quantised in "
            f"blocks of {weight.block_size} that run across the ends of its rows, "
            "which no layer of jaxbnb has. Convert the checkpoint with a dtype, which "
            "decodes it, and quantise it again"
        )
    return _matrix(checkpoint, weight, name, rows, size)


def _matrix(
    checkpoint: Checkpoint, weight: _Weight, name: str, rows: int, size: int
) -> QuantizedArray:
    """The arrays of a weight read as those of a kernel ``(size, rows)``."""
    # Arrays of NumPy, of which jaxtyping's Array does not know.
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
        _check_codebook(checkpoint, f"{name}.quant_map", _CODEBOOKS[weight.quant_type])
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


def _check_codebook(checkpoint: Checkpoint, name: str, want: np.ndarray) -> None:
    # Another map under the name of ours would decode to other values.
    if not np.array_equal(checkpoint.read(name).reshape(-1), want):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: the levels of {name!r} are not bitsandbytes' own"
        )


def _read(
    checkpoint: Checkpoint, weights: Mapping[str, _Weight], name: str
) -> np.ndarray:
    """One tensor; a quantised weight is decoded, as ``(out, in)``."""
    if name not in weights:
        return checkpoint.read(name)
    weight = weights[name]
    shape = weight.info.shape
    # In one row blocks may run where they will.
    rows = shape[0] if weight.quant_type == LLM_INT8 else 1
    q = _matrix(checkpoint, weight, name, rows, math.prod(shape) // max(rows, 1))
    decoded = dataclasses.replace(q, axis=-1).dequantize()
    return np.asarray(jax.device_get(decoded)).reshape(shape)


def _is_size(value: Any, largest: int) -> bool:
    return type(value) is int and 0 < value <= largest


def _is_shape(value: Any) -> bool:
    # The product is held against the file's bytes afterwards.
    is_list = isinstance(value, list) and 1 <= len(value) <= 4
    return is_list and all(_is_size(size, 2**40) for size in value)
