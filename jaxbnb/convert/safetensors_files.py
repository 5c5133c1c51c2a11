"""safetensors files: a header that is checked before it is believed, and a writer.

The library reads the tensors. Its header checks are sound but say little of what is
wrong (``InvalidHeaderDeserialization``), so ours come first and say it; what passes
them, the library accepts.
"""

import io
import json
import struct
from collections.abc import Mapping, Sequence
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
}
# No model computes in these: their values need a scale for each block.
_QUANTIZED: Final = ("F8_", "F6_", "F4")
# The library's own limit; the largest checkpoints have headers of some 10 MB.
MAX_HEADER_BYTES: Final = 100_000_000
# NumPy's, and far beyond any tensor.
_MAX_AXES: Final = 32
_MAX_AXIS: Final = 2**40


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file declares, in the order of their bytes.

    Reads the header alone, and of that no more than the file has.

    Raises:
        CheckpointError: the file is truncated, or its header is no JSON, or what the
            header says of dtypes, shapes and offsets does not add up to the file.
        UnsupportedCheckpointError: a dtype that NumPy and the library do not share.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else None
        if length is None or length > size - 8:
            want = "8 bytes" if length is None else f"a header of {length:,} bytes"
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: it has {size:,} bytes "
                f"and should begin with {want}; download or save it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: a header of {length:,} bytes; the format allows "
                f"{MAX_HEADER_BYTES:,}"
            )
        text = file.read(length)
    header = _parse(path, text)
    entries = [(name, *_entry(path, name, entry)) for name, entry in header.items()]
    # Empty tensors share their offset with the tensor that follows.
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
            f"tensors and {size - 8 - length:,} follow it; download or save it again"
        )
    return {name: info for name, info, _, _ in entries}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads one tensor of a file whose header `read_header` has passed.

    The file is mapped for this read only: a mapping that is kept would count every
    page once read as memory of the process, up to the whole file.

    Raises:
        ImportError: safetensors is not installed.
        CheckpointError: the library refuses the file.
    """
    return read_tensors(path, [name])[name]


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """As `read_tensor`, several small ones at once, of which there is one at least.

    The library parses the header each time it opens a file: 2 ms where a small model
    has its 210 quant states.
    """
    library = import_extra("safetensors", needed_by="jaxbnb.convert", extra="convert")
    name = names[0]
    found: dict[str, np.ndarray] = {}
    try:
        with library.safe_open(path, framework="np") as file:
            for name in names:
                found[name] = file.get_tensor(name)
    except library.SafetensorError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from error
    return found


def layout(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The header of a file of these tensors, and the byte at which each one starts.

    Larger elements come first, so that all are aligned.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # transformers refuses a file that does not say for whom its layout is.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in names:
        starts[name], end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": codes[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = struct.pack("<Q", len(text)) + text
    return first, {name: len(first) + start for name, start in starts.items()}


def write_bytes(file: io.FileIO, data: bytes | np.ndarray) -> int:
    """Writes an array, or bytes, where the file is; the bytes that these were.

    Raises:
        OSError: writing failed, e.g. on a full disk; it names the file.
    """
    content = data if isinstance(data, bytes) else raw(data)
    _write(file, content)
    return len(content)


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array; copied where they do not lie one after the other."""
    # bfloat16 has no buffer protocol; its bytes do.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    try:
        while left:
            # One call writes 2 GiB at most.
            left = left[file.write(left) :]
    except OSError as error:
        error.filename = file.name
        raise


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header as a dict of entries, without the metadata."""
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header of a safetensors file starts with '{{', got "
            f"{text[:8]!r}; the file is corrupt, or is no safetensors file"
        )
    header = parse_json(path, text)
    try:
        "".join(header).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: a tensor's name is no Unicode: {error}"
        ) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Shape and dtype, first byte and last of one tensor."""
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
            f"{path}: tensor {name!r}: a shape is at most {_MAX_AXES} sizes from 0 to "
            f"2**40, got {str(shape)[:100]}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: tensor {name!r}: data_offsets must be [first, last] with "
            f"0 <= first <= last, got {str(offsets)[:100]}"
        )
    if str(code).startswith(_QUANTIZED):
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
