"""Writes a model as a GGUF file, tensor by tensor.

`jaxbnb.convert._gguf_description` says how the tensors of a GGUF file become Hugging
Face's. Here the same tables are read backwards.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxbnb.convert import _gguf, _gguf_model
from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._gguf_blocks import BLOCK_TYPES, BlockType
from jaxbnb.convert._gguf_description import Description
from jaxbnb.convert.pieces import Progress
from jaxbnb.convert.plan import TensorReport, source_format
from jaxbnb.convert.weights import cast_whole, sqnr
from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write

# Types that the gguf package encodes and that jaxbnb decodes.
GGUF_TYPES: Final = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_FLOATS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TYPES: Final = {block.name: block for block in BLOCK_TYPES.values()}
# llama.cpp computes with these in float32.
_FLOAT32_MODULES: Final = ("position_embd", "ffn_gate_inp")
# llama.cpp gives these more bits than the rest: 6, which the gguf package does not
# encode.
_EIGHT_BIT_MODULES: Final = ("token_embd", "output")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor to write.

    Attributes:
        name: GGUF's name.
        shape: shape in the file.
        block: how the elements are stored.
        report: report on it, by Hugging Face's name and without an SQNR.
        read: function that reads the values, in parts along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    block: BlockType
    report: TensorReport
    read: Callable[[], Iterator[np.ndarray]]


def check_type(quant: str) -> None:
    """Raises ValueError unless ``quant`` is a type that can be written."""
    if quant not in GGUF_TYPES:
        raise ValueError(
            f"GGUF files are written in {', '.join(GGUF_TYPES)}, which the gguf "
            f"package encodes; got {quant!r}. For another type, e.g. Q4_K_M, write "
            "float16, and then run llama.cpp's llama-quantize FILE OUT Q4_K_M"
        )


def describe(metadata: Mapping[str, Any], names: Sequence[str]) -> Description:
    """Returns what a reader takes a file for.

    Args:
        metadata: fields of the file.
        names: names of tensors that a file has or has not.
    """
    # Readers look at these tensors only to see whether they are there.
    path = Path("the GGUF file")
    tensor = _gguf.GgufTensor((), _TYPES["F32"], 0, path)
    return _gguf_model.describe(
        _gguf.Gguf(path, dict(metadata), dict.fromkeys(names, tensor))
    )


def plan_tensors(
    source: Checkpoint, description: Description, quant: str | None, dtype: str
) -> list[StoredTensor]:
    """Returns the tensors of a file.

    Args:
        source: checkpoint with the names of transformers' complete model.
        description: the model, from `describe`.
        quant: type of matrices, one of `GGUF_TYPES`, or None.
        dtype: dtype of matrices that are not quantised.

    Raises:
        MissingTensorError: the checkpoint lacks a tensor.
    """
    return [
        _plan_tensor(source, description, each, quant, dtype)
        for each in _gguf_model.expect_tensors(description)
    ]


def _plan_tensor(
    source: Checkpoint,
    description: Description,
    expected: _gguf_model.Expected,
    quant: str | None,
    dtype: str,
) -> StoredTensor:
    stored, module, name, shape = expected
    block = _choose_block(module, shape, quant, dtype)
    count = shape[0] if len(shape) == 3 else 1
    names = [name.format(i) for i in range(count)] if len(shape) == 3 else [name]
    size = int(np.prod(shape, dtype=np.int64))
    note = ""
    if quant is not None and len(shape) > 1 and block.size == 1:
        note = f"rows of {shape[-1]}, not a multiple of {_TYPES[quant.upper()].size}"
        note = note if module not in _FLOAT32_MODULES else ""
    report = TensorReport(
        name=name,
        shape=shape,
        source=source_format(source, names[0]) if names[0] in source.tensors else "",
        result=block.dtype.name if block.size == 1 else block.name,
        nbytes=size // block.size * block.nbytes,
        note=note,
    )
    read = functools.partial(_read, source, description, module, names)
    return StoredTensor(stored, shape, block, report, read)


def _choose_block(
    module: str, shape: tuple[int, ...], quant: str | None, dtype: str
) -> BlockType:
    if len(shape) == 1 or module in _FLOAT32_MODULES:
        return _TYPES["F32"]
    if quant is None:
        return _TYPES[_FLOATS[dtype]]
    block = _TYPES["Q8_0" if module in _EIGHT_BIT_MODULES else quant.upper()]
    # As llama.cpp's own conversion does.
    return block if shape[-1] % block.size == 0 else _TYPES["F16"]


def _read(
    source: Checkpoint, description: Description, module: str, names: Sequence[str]
) -> Iterator[np.ndarray]:
    """Yields the values as a file orders them, one expert at a time."""
    for name in names:
        values = source.read(name)
        if values.ndim == 2 and module in description.transposed:
            values = values.T
        if description.is_norm_plus_one and module.endswith("norm"):
            values = values.astype(np.float32) + 1
        order = description.orders.get(module)
        if order is not None:
            (first, second), shape = order[1], list(order[0])
            shape[first], shape[second] = shape[second], shape[first]
            split = shape[0], shape[1], shape[2]
            values = _gguf_model.reorder(values, (split, order[1]))
        yield values


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[StoredTensor],
    extra: Mapping[str, np.ndarray],
    source: Checkpoint,
    *,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> int:
    """Writes a file, which appears under its name when it is complete.

    Args:
        path: path of the file. There must be nothing.
        metadata: fields: str, bool, int (uint32), float (float32), and lists of one of
            these (of int32 and float32).
        tensors: tensors of the model.
        extra: small float32 tensors besides, such as factors of rope.
        source: checkpoint that the values are from, for errors.
        progress: called as ``progress(done_bytes, total_bytes, name)``.
        report: called with the report on each tensor after it is written.

    Returns:
        The number of bytes of the tensors.

    Raises:
        FileExistsError: there is something at ``path``.
        CheckpointError: finite values are beyond the range of float16.
        ImportError: gguf is not installed.
        OSError: writing failed. Nothing is left behind.
    """
    library = import_extra("gguf", needed_by="writing a GGUF file", extra="gguf")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name")
    fields = dict(metadata)
    architecture = fields.pop("general.architecture")
    path.parent.mkdir(parents=True, exist_ok=True)
    total, done = sum(tensor.report.nbytes for tensor in tensors), 0
    with atomic_write(path) as temporary:
        writer = library.GGUFWriter(temporary, architecture)
        try:
            for key, value in fields.items():
                _add_field(writer, key, value)
            for name, array in extra.items():
                writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
            for tensor in tensors:
                kind = library.GGMLQuantizationType[tensor.block.name]
                writer.add_tensor_info(
                    tensor.name,
                    tensor.shape,
                    np.dtype(np.float32),
                    tensor.report.nbytes,
                    kind,
                )
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in extra.values():
                writer.write_tensor_data(array)
            for tensor in tensors:
                rows, powers = [], []
                for values in tensor.read():
                    encoded, power = _encode(source, tensor, values, library)
                    rows.append(encoded)
                    powers.append(power)
                whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
                writer.write_tensor_data(whole)
                done += tensor.report.nbytes
                if progress is not None:
                    progress(done, total, tensor.report.name)
                if report is not None:
                    is_quantized = tensor.block.size > 1
                    ratio = sqnr(powers) if is_quantized else None
                    report(dataclasses.replace(tensor.report, sqnr=ratio))
        finally:
            writer.close()
    return total


def _encode(
    source: Checkpoint, tensor: StoredTensor, values: np.ndarray, library: Any
) -> tuple[np.ndarray, tuple[float, float]]:
    """Returns the stored bytes of values, and the powers of these and of their errors.

    The powers are 0 for floats.
    """
    block, name = tensor.block, tensor.report.name
    if block.size == 1:
        cast = cast_whole(source, name, np.ascontiguousarray(values), block.dtype)
        # The writer takes uint8 for any type.
        return np.atleast_1d(cast).view(np.uint8), (0.0, 0.0)
    exact = np.ascontiguousarray(values, np.float32)
    kind = library.GGMLQuantizationType[block.name]
    rows = library.quants.quantize(exact, kind)
    error = block.decode(rows.reshape(-1, rows.shape[-1])).reshape(exact.shape) - exact
    return rows, (float(np.vdot(exact, exact)), float(np.vdot(error, error)))


def _add_field(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, [x.item() if hasattr(x, "item") else x for x in value])
