"""GGUF files: the metadata, and where each tensor lies.

The layout, little endian: ``GGUF``, a uint32 version, uint64 numbers of tensors and of
metadata fields, the metadata (key, type, value), the tensors (name, axes, type,
offset) and, from the next multiple of the alignment, the data. Every count and length
is compared with the rest of the file before memory is allocated for it.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from jaxtyping import UInt8

from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._gguf_blocks import BLOCK_TYPES, BlockType, name_type

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS: Final[dict[int, str]] = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies and how it is stored.

    Attributes:
        shape: sizes of the axes, slowest first, as in NumPy. (GGUF writes the fastest
            first.)
        block: how the elements are stored.
        offset: position of the first byte in the file.
        path: path of the file.
    """

    shape: tuple[int, ...]
    block: BlockType
    offset: int
    path: Path

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) // self.block.size * self.block.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class Gguf:
    """The header of a GGUF file.

    Attributes:
        path: path of the file; of the first one, if the model is split into several.
        metadata: ints, floats, bools and strings by key; an array is a list of strings
            or a one-dimensional NumPy array.
        tensors: tensors by name, in the order of the file; of all files.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> Gguf:
    """Reads the header of a GGUF file, versions 2 and 3, or of all files of a model.

    Args:
        path: path of the file; of any of them, if the model is split into several.

    Raises:
        CheckpointError: the file is not GGUF, is truncated, or contradicts itself; or
            other files of the model are missing or do not belong to it.
        UnsupportedCheckpointError: the file has another version, nested arrays, or a
            quantisation type that jaxbnb does not decode.
    """
    gguf = _read_file(path)
    count = _read_int(gguf, "split.count", 1)
    return gguf if count <= 1 else _join(gguf, count)


def list_parts(path: Path) -> list[Path]:
    """Returns the files that a model is split into, by the name of one of them.

    Example:
        >>> [part.name for part in list_parts(Path("m-00002-of-00002.gguf"))]
        ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
        >>> [part.name for part in list_parts(Path("m.gguf"))]
        ['m.gguf']
    """
    found = re.fullmatch(r"(.*)-(?a:\d{5})-of-((?a:\d{5}))\.gguf", path.name)
    if found is None:
        return [path]
    start, count = found.groups()
    names = [f"{start}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]
    return [path.with_name(name) for name in names]


def _join(gguf: Gguf, count: int) -> Gguf:
    """Returns the header of a whole model, when one of its files is read."""
    paths = list_parts(gguf.path)
    if len(paths) != count:
        raise CheckpointError(
            f"{gguf.path} has split.count {count}, so its name must end in "
            f"-00001-of-{count:05}.gguf; give the files back their names"
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{gguf.path} is one of {count} files, and {len(missing)} are missing, "
            f"e.g. {missing[0]}; put them into the same folder"
        )
    parts = [gguf if path == gguf.path else _read_file(path) for path in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        place = _read_int(part, "split.no", -1), _read_int(part, "split.count", -1)
        if place != (number, count):
            raise CheckpointError(
                f"{part.path} has split.no {place[0]} and split.count {place[1]}, but "
                f"its name says {number} and {count}; download it again"
            )
        if not tensors.keys().isdisjoint(part.tensors):
            raise CheckpointError(f"{part.path} has a tensor of an earlier file again")
        tensors |= part.tensors
    total = _read_int(parts[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{gguf.path} is one of {count} files with {total} tensors together, but "
            f"they have {len(tensors)}; download them again"
        )
    return Gguf(paths[0], parts[0].metadata, tensors)


def _read_int(gguf: Gguf, key: str, default: int) -> int:
    value = gguf.metadata.get(key, default)
    if type(value) is not int:
        raise CheckpointError(
            f"{gguf.path}: metadata {key!r} should be of type int, got "
            f"{str(value)[:60]!r}"
        )
    return value


def _read_file(path: Path) -> Gguf:
    with path.open("rb") as file:
        cursor = _Cursor(path, file, os.fstat(file.fileno()).st_size)
        _check_version(cursor)
        tensor_count = cursor.read_count("tensors", at_least=8 + 4 + 8 + 4 + 8)
        metadata_count = cursor.read_count("metadata", at_least=8 + 4 + 1)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.read_string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{path}: metadata {key!r} comes twice")
            metadata[key] = cursor.read_value(key)
        entries = [cursor.read_tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in (2**n for n in range(17)):
            raise CheckpointError(
                f"{path}: general.alignment must be a power of two up to 65536, "
                f"got {alignment!r}"
            )
        start = -(-file.tell() // alignment) * alignment
    return Gguf(path, metadata, _place(path, entries, start, alignment, cursor.size))


def read_rows(
    gguf: Gguf, name: str, part: int | None = None
) -> UInt8[np.ndarray, "rows row_bytes"]:
    """Reads the stored bytes of one tensor, one row for each row of its last axis.

    Args:
        gguf: header of the file.
        name: name of the tensor.
        part: index along the first axis, to read only this part; None to read all.
    """
    tensor = gguf.tensors[name]
    parts = 1 if part is None else tensor.shape[0]
    nbytes = tensor.nbytes // parts
    offset = tensor.offset + (part or 0) * nbytes
    raw = np.fromfile(tensor.path, np.uint8, count=nbytes, offset=offset)
    if raw.size != nbytes:
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} ends after {raw.size:,} of {nbytes:,} "
            "bytes; the file was truncated after it was opened"
        )
    return raw.reshape(math.prod(tensor.shape[:-1]) // parts, -1)


@dataclasses.dataclass(frozen=True)
class _Cursor:
    """Reads the fields of a header in order, never beyond the end of the file."""

    path: Path
    file: BinaryIO
    size: int

    def take(self, count: int, what: str) -> bytes:
        left = self.size - self.file.tell()
        if count > left:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: {what} takes {count:,} bytes at "
                f"byte {self.size - left:,}, but the file has {left:,} left; download "
                "it again"
            )
        return self.file.read(count)

    def read_scalar(self, code: str, what: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size, what))[0]

    def read_count(self, what: str, *, at_least: int) -> int:
        """Reads a uint64 number of things that take ``at_least`` bytes each."""
        count = self.read_scalar("Q", f"the number of {what}")
        left = self.size - self.file.tell()
        if count * at_least > left:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: it announces {count:,} {what}, "
                f"but has {left:,} bytes left; download it again"
            )
        return count

    def read_string(self, what: str) -> str:
        text = self.take(self.read_scalar("Q", what), what)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {what} is not UTF-8: {error}"
            ) from error

    def read_strings(self, count: int, what: str) -> list[str]:
        """Reads many strings, e.g. a vocabulary of 10^5.

        Unlike `read_string`, it asks the operating system for the position only once.
        """
        left = self.size - self.file.tell()
        texts: list[bytes] = []
        for _ in range(count):
            length = int.from_bytes(self.file.read(8), "little")
            left -= 8 + length
            if left < 0:
                raise CheckpointError(
                    f"{self.path} is truncated or corrupt: a string of {what} takes "
                    f"{length:,} bytes, {-left:,} more than the file has; download it "
                    "again"
                )
            texts.append(self.file.read(length))
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {what} is not UTF-8: {error}"
            ) from error

    def read_value(self, key: str) -> Any:
        kind, what = self.read_scalar("I", f"the type of {key!r}"), f"metadata {key!r}"
        if kind == _STRING:
            return self.read_string(what)
        if kind != _ARRAY:
            return self.read_scalar(self._find_code(kind, what), what)
        kind = self.read_scalar("I", what)
        if kind == _ARRAY:
            raise UnsupportedCheckpointError(f"{self.path}: {what} is a nested array")
        if kind == _STRING:
            count = self.read_count(f"strings in {what}", at_least=8)
            return self.read_strings(count, what)
        dtype = np.dtype("<" + self._find_code(kind, what))
        count = self.read_count(f"values in {what}", at_least=dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def read_tensor(self) -> tuple[str, GgufTensor]:
        """Reads the entry of a tensor. Its offset counts from the start of the data."""
        name = self.read_string("a tensor's name")
        what = f"tensor {name!r}"
        axes = self.read_scalar("I", what)
        if not 1 <= axes <= 4:
            raise CheckpointError(f"{self.path}: {what} has {axes} axes, not 1 to 4")
        shape = tuple(self.read_scalar("Q", what) for _ in range(axes))[::-1]
        kind, offset = self.read_scalar("I", what), self.read_scalar("Q", what)
        if kind not in BLOCK_TYPES:
            known = [block.name for block in BLOCK_TYPES.values()]
            raise UnsupportedCheckpointError(
                f"{self.path}: {what} is stored as {name_type(kind)}, which jaxbnb "
                f"does not decode; it decodes {known}. Get the model in one of these"
            )
        block = BLOCK_TYPES[kind]
        if min(shape) < 1 or max(shape) > 2**40 or shape[-1] % block.size:
            raise CheckpointError(
                f"{self.path}: {what} has shape {shape}; axes must be positive, and "
                f"the last a multiple of {block.size}, the block of {block.name}"
            )
        return name, GgufTensor(shape, block, offset, self.path)

    def _find_code(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {what} has the unknown type {kind}")
        return _SCALARS[kind]


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.take(min(4, cursor.size), "the magic")
    if magic != MAGIC:
        raise CheckpointError(
            f"{cursor.path} is not a GGUF file: it starts with {magic!r} instead of "
            f"{MAGIC!r}. Open a GGUF file, or a folder with config.json and "
            "model.safetensors"
        )
    version = cursor.read_scalar("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        got = "a big-endian file" if swapped in _VERSIONS else f"version {version}"
        raise UnsupportedCheckpointError(
            f"{cursor.path}: {got} of GGUF; jaxbnb reads little-endian files of "
            f"versions {_VERSIONS}"
        )


def _place(
    path: Path,
    entries: list[tuple[str, GgufTensor]],
    start: int,
    alignment: int,
    size: int,
) -> dict[str, GgufTensor]:
    """Checks that the tensors fill the data, and makes their offsets absolute."""
    if not entries:
        return {}  # A vocabulary without a model still gives a tokenizer.
    end = 0
    for name, tensor in sorted(entries, key=lambda entry: entry[1].offset):
        # ggml requires the same. As padding makes the only gaps, a wrong size shows.
        if tensor.offset != -(-end // alignment) * alignment:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {tensor.shape} starts at byte "
                f"{tensor.offset:,} of the data, but the one before it ends at "
                f"{end:,}; the file is corrupt"
            )
        end = tensor.offset + tensor.nbytes
    if start + end > size:
        raise CheckpointError(
            f"{path} is truncated: its tensors end at byte {start + end:,} and the "
            f"file at {size:,}; download it again"
        )
    if size - start - end >= alignment:
        raise CheckpointError(
            f"{path}: {size - start - end:,} bytes follow the last tensor, more than "
            f"the alignment of {alignment} explains; the file is corrupt"
        )
    placed = {
        name: dataclasses.replace(tensor, offset=start + tensor.offset)
        for name, tensor in entries
    }
    if len(placed) < len(entries):
        raise CheckpointError(f"{path}: two tensors have the same name")
    return placed
