"""safetensors files: checks the header before trusting it, and writes files.

The library reads the tensors. Its checks of the header are sound, but their messages
say little (``InvalidHeaderDeserialization``), so our checks come first. The library
accepts every file that passes them.
"""

import io
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    QuantizedTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.convert.json_files import parse_json
from jaxbnb.core.extras import import_extra

DTYPES: Final[dict[str, np.dtype]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
# Codes and scales of quantised weights. The library makes no NumPy arrays of them.
FLOAT8: Final = tuple(dtype for code, dtype in DTYPES.items() if code[:2] == "F8")
# No model computes in these dtypes: their values need a scale for each block.
_QUANTIZED: Final = ("F8_", "F6_", "F4")
# The library's limit. The largest checkpoints have headers of about 10 MB.
MAX_HEADER_BYTES: Final = 100_000_000
# Limits: NumPy's, and one far beyond any tensor.
_MAX_AXES: Final = 32
_MAX_AXIS: Final = 2**40


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of a safetensors file in the order of their bytes.

    Reads only the header, and never beyond the end of the file.

    Raises:
        CheckpointError: the file is truncated, its header is not JSON, or the dtypes,
            shapes and offsets in the header do not add up to the file.
        UnsupportedCheckpointError: NumPy does not have the dtype of a tensor.
    """
    return {name: info for name, (info, _) in _read_entries(path).items()}


def _read_entries(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Returns the tensors of `read_header`, and the byte where each starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else None
        if length is None or length > size - 8:
            start = "8 bytes" if length is None else f"a header of {length:,} bytes"
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it has {size:,} bytes "
                f"and should begin with {start}; download or save it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: a header of {length:,} bytes; the format allows "
                f"{MAX_HEADER_BYTES:,}"
            )
        text = file.read(length)
    header = _parse(path, text)
    entries = [
        (name, *_check_entry(path, name, entry)) for name, entry in header.items()
    ]
    # An empty tensor has the same offset as the tensor after it.
    entries.sort(key=lambda entry: entry[2:])
    end = 0
    for name, _, first, last in entries:
        if first != end:
            what = "overlaps" if first < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {first:,} of the data, which "
                f"{what} the tensor before it, ending at {end:,}; the file is corrupt"
            )
        end = last
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path} is truncated or corrupt: its header describes {end:,} bytes of "
            f"tensors, but {size - 8 - length:,} follow; download or save it again"
        )
    return {name: (info, 8 + length + first) for name, info, first, _ in entries}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads one tensor of a file that `read_header` has accepted.

    The file is mapped only for this read. With a permanent mapping, every page that was
    ever read would count as memory of the process, up to the size of the file.

    Raises:
        ImportError: safetensors is not installed.
        CheckpointError: the library refuses the file.
    """
    return read_tensors(path, [name])[name]


def map_tensor(path: Path, name: str) -> np.ndarray:
    """Maps one tensor of a file that `read_header` has accepted.

    Its bytes are read when they are used, so a slice reads no more than its pages.

    Raises:
        CheckpointError: the file has changed since its header was read.
    """
    try:
        info, first = _read_entries(path)[name]
        if info.nbytes == 0:
            return np.zeros(info.shape, info.dtype)
        flat = np.memmap(path, np.uint8, "r", first, (info.nbytes,))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from error
    return np.asarray(flat).view(info.dtype).reshape(info.shape)


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads one or more small tensors at once; otherwise like `read_tensor`.

    The library parses the header each time it opens a file. In a small model this takes
    2 ms, for each of 210 quant states.
    """
    library = import_extra("safetensors", needed_by="jaxbnb.convert", extra="convert")
    name = names[0]
    arrays: dict[str, np.ndarray] = {}
    try:
        with library.safe_open(path, framework="np") as file:
            for name in names:
                if file.get_slice(name).get_dtype().startswith("F8_"):
                    arrays[name] = _read_float8(path, name)
                else:
                    arrays[name] = file.get_tensor(name)
    except library.SafetensorError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from error
    return arrays


def _read_float8(path: Path, name: str) -> np.ndarray:
    info, first = _read_entries(path)[name]
    flat = np.fromfile(path, np.uint8, info.nbytes, offset=first)
    if flat.size < info.nbytes:
        raise CheckpointError(
            f"{path} was cut short while it was read; download it again"
        )
    return flat.view(info.dtype).reshape(info.shape)


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a file that `read_header` has accepted."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)).get("__metadata__", {})


def layout(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Returns the header of a file, and the byte where each of its tensors starts.

    Tensors with larger elements come first, so that all are aligned.

    Args:
        tensors: shapes and dtypes by name.
        metadata: metadata of the file; None for that of a model's weights.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # transformers refuses a file without a format.
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    starts: dict[str, int] = {}
    end = 0
    for name in names:
        starts[name], end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = struct.pack("<Q", len(text)) + text
    return first, {name: len(first) + start for name, start in starts.items()}


def write_bytes(file: io.FileIO, data: bytes | np.ndarray) -> int:
    """Writes an array or bytes at the current position; returns the number of bytes.

    Raises:
        OSError: writing failed, e.g. on a full disk; the error names the file.
    """
    content = data if isinstance(data, bytes) else view_bytes(data)
    _write(file, content)
    return len(content)


def write_file(
    path: Path, header: bytes, arrays: Iterator[np.ndarray]
) -> OSError | None:
    """Writes a file, and waits for the disk; returns an error instead of raising it.

    Under `jax.distributed`, the other processes may have to hear of the error first.

    Args:
        path: path of the file.
        header: first bytes, by `layout`.
        arrays: tensors in the order of their bytes.
    """
    try:
        with path.open("wb", buffering=0) as file:
            write_bytes(file, header)
            for array in arrays:
                write_bytes(file, array)
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def view_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array, copied if they are not contiguous."""
    # bfloat16 does not support the buffer protocol, but uint8 does.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    try:
        while left:
            # One call writes at most 2 GiB.
            left = left[file.write(left) :]
    except OSError as error:
        error.filename = file.name
        raise


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """Returns the entries of the header, without the metadata."""
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header of a safetensors file starts with '{{', got "
            f"{text[:8]!r}; the file is corrupt, or not a safetensors file"
        )
    header = parse_json(path, text)
    try:
        "".join(header).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: a tensor's name is not valid Unicode: {error}"
        ) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return header


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Returns shape and dtype, first byte and end of one tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets, "
            f"got {str(entry)[:100]}"
        )
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    if (
        not _are_sizes(shape)
        or len(shape) > _MAX_AXES
        or max(shape, default=0) > _MAX_AXIS
    ):
        raise CheckpointError(
            f"{path}: tensor {name!r}: a shape has at most {_MAX_AXES} sizes from 0 to "
            f"2**40, got {str(shape)[:100]}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: tensor {name!r}: data_offsets must be [first, last] with "
            f"0 <= first <= last, got {str(offsets)[:100]}"
        )
    if str(code).startswith(_QUANTIZED) and code not in DTYPES:
        raise QuantizedTensorError(path, name, code)
    if not isinstance(code, str) or code not in DTYPES:
        raise UnsupportedCheckpointError(
            f"{path}: tensor {name!r} has dtype {code!r}; jaxbnb reads {list(DTYPES)}. "
            "Convert the checkpoint to BF16 with the library that made it"
        )
    info = TensorInfo(tuple(shape), DTYPES[code])
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of dtype {code} and shape {shape} has "
            f"{info.nbytes:,} bytes, but the header gives it "
            f"{offsets[1] - offsets[0]:,}; the file is corrupt"
        )
    return info, offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
