"""Files of rows: where each row is, how it is read, and how errors name it."""

import array
import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from jaxbnb.core.extras import import_extra
from jaxbnb.data._errors import DataError

# Rows and parts of a file that a fingerprint covers, spread evenly.
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 1 << 16


class BadRow(NamedTuple):
    """A row that was left out.

    Attributes:
        place: file and line, e.g. "speeches.jsonl, line 17".
        reason: what is wrong with it.
    """

    place: str
    reason: str


OnBad = Callable[[BadRow], None]


class Rows(Protocol):
    """Rows of one source, read in any order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Reads a row."""
        ...

    def describe(self, index: int) -> str:
        """Says where a row is."""
        ...

    def samples(self) -> Iterator[bytes]:
        """Yields parts of the contents for a fingerprint."""
        ...


class JsonLines:
    """The lines of a file, each a JSON object. Blank lines do not count.

    Memory is 16 bytes a row: where it starts, and its line.

    Args:
        path: path of the file.
        on_bad: called for each line that is not a JSON object.
    """

    def __init__(self, path: Path, on_bad: OnBad):
        self.path = path
        starts, lines = array.array("Q"), array.array("Q")
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                begin, start = start, start + len(line)
                if number == 1:
                    _check_encoding(path, line)
                    if line.startswith(codecs.BOM_UTF8):
                        begin, line = len(codecs.BOM_UTF8), line[3:]
                if not line.strip():
                    continue
                try:
                    _parse_object(line)
                except ValueError as error:
                    on_bad(BadRow(f"{path}, line {number}", str(error)))
                else:
                    starts.append(begin)
                    lines.append(number)
        self._starts, self._lines = starts, lines

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> dict[str, Any]:
        """Reads a row."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return _parse_object(line)
        except ValueError as error:
            raise DataError(
                f"{self.describe(index)} has changed since the file was opened, and is "
                f"not a row any more: {error}"
            ) from error

    def describe(self, index: int) -> str:
        """Says where a row is."""
        return f"{self.path}, line {self._lines[index]}"

    def samples(self) -> Iterator[bytes]:
        """Yields parts of the contents for a fingerprint."""
        return _sample_file(self.path)


class TextFile:
    """A file of plain text: one row with one document.

    Args:
        path: path of the file.
        on_bad: called if the file is empty or not UTF-8.
    """

    def __init__(self, path: Path, on_bad: OnBad):
        self.path = path
        self._length = 0
        try:
            if self.read(0)["text"].strip():
                self._length = 1
            else:
                on_bad(BadRow(str(path), "the file is empty"))
        except UnicodeDecodeError as error:
            on_bad(BadRow(str(path), f"not UTF-8: {error}"))

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        """Reads a row."""
        return {"text": self.path.read_text(encoding="utf-8-sig")}

    def describe(self, index: int) -> str:
        """Says where a row is."""
        return str(self.path)

    def samples(self) -> Iterator[bytes]:
        """Yields parts of the contents for a fingerprint."""
        return _sample_file(self.path)


class SequenceRows:
    """Rows that have a length and an index: a list, a Hugging Face dataset, ...

    Args:
        rows: the rows.
        path: file that they come from; None if there is none.
    """

    def __init__(self, rows: Any, path: Path | None = None):
        self._rows = rows
        self._path = path

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> dict[str, Any]:
        """Reads a row."""
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(
                f"{self.describe(index)} is of type {type(row).__name__}, not a dict. "
                "A list of texts is given as [{'text': text} for text in texts], a "
                "pandas table as table.to_dict('records')"
            )
        return dict(row)

    def describe(self, index: int) -> str:
        """Says where a row is."""
        return f"row {index}" if self._path is None else f"{self._path}, row {index}"

    def samples(self) -> Iterator[bytes]:
        """Yields parts of the contents for a fingerprint."""
        if self._path is not None:
            yield from _sample_file(self._path)
            return
        yield from _sample_rows(self)


class ArrowRows(SequenceRows):
    """The rows of a Parquet file, in memory as Arrow's columns.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path):
        import_extra("pyarrow", needed_by="a .parquet file", extra="parquet")
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a sound Parquet file: {error}") from error
        super().__init__(table, path)

    def read(self, index: int) -> dict[str, Any]:
        """Reads a row."""
        return self._rows.slice(index, 1).to_pylist()[0]


def open_rows(path: Path, on_bad: OnBad) -> Rows:
    """Opens a file by the ending of its name.

    Args:
        path: path of the file.
        on_bad: called for each row that cannot be read.

    Raises:
        DataError: the file is of another kind, damaged, or a folder.
        FileNotFoundError: the file does not exist.
    """
    # A text in place of a path may be too long for pathlib to ask about.
    if os.path.isdir(path):
        raise DataError(
            f"{path} is a folder; give its files: "
            f"sorted(pathlib.Path({os.fspath(path)!r}).glob('*.jsonl'))"
        )
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path!s:.200}: no such file. Texts are given as rows, "
            "[{'text': text} for text in texts]"
        )
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path, on_bad)
        case ".json":
            return _read_json(path, on_bad)
        case ".txt" | ".md":
            return TextFile(path, on_bad)
        case ".parquet":
            return ArrowRows(path)
    raise DataError(
        f"{path}: the name must end in .jsonl, .json, .txt, .md or .parquet. For "
        "anything else, read it and give the rows: an iterable of dicts"
    )


def fingerprint(sources: Sequence[Rows]) -> str:
    """Returns a digest of the number of rows and of samples of the contents."""
    digest = hashlib.sha256()
    for rows in sources:
        digest.update(b"%d rows" % len(rows))
        for sample in rows.samples():
            digest.update(b"%d bytes" % len(sample) + sample)
    return digest.hexdigest()


def hash_rows(rows: Rows) -> str:
    """Returns a digest of the number of rows and of 64 of them, in any kind of file."""
    digest = hashlib.sha256(b"%d rows" % len(rows))
    for sample in _sample_rows(rows):
        digest.update(b"%d bytes" % len(sample) + sample)
    return digest.hexdigest()


def _read_json(path: Path, on_bad: OnBad) -> Rows:
    contents = path.read_bytes()
    _check_encoding(path, contents)
    try:
        rows = json.loads(contents.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. If each line is an object of its own, "
            "its name must end in .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} must hold a list of objects, got {type(rows).__name__}. For other "
            "layouts, read it and give the rows: an iterable of dicts"
        )
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            on_bad(BadRow(f"{path}, row {index}", f"not an object: {row!r:.100}"))
    # Errors name a row by its place in the file, which leaving rows out would shift.
    return _Kept(
        [index for index, row in enumerate(rows) if type(row) is dict], rows, path
    )


class _Kept(SequenceRows):
    """The rows of a list that are dicts."""

    def __init__(self, kept: list[int], rows: list[Any], path: Path):
        super().__init__([rows[index] for index in kept], path)
        self._kept = kept

    def describe(self, index: int) -> str:
        return super().describe(self._kept[index])


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {row!r:.100}")
    return row


def _check_encoding(path: Path, start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is in UTF-16; save it in UTF-8")


def _sample_rows(rows: Rows) -> Iterator[bytes]:
    for index in spread(len(rows)):
        row = rows.read(index)
        yield json.dumps(row, sort_keys=True, default=_name_type).encode()


def _sample_file(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield b"%d" % size
    with path.open("rb") as file:
        for part in spread(-(-size // _SAMPLE_BYTES)):
            # The last part ends with the file.
            file.seek(max(0, min(part * _SAMPLE_BYTES, size - _SAMPLE_BYTES)))
            yield file.read(_SAMPLE_BYTES)


def spread(count: int) -> list[int]:
    """Returns evenly spread numbers from 0 to ``count - 1``, with both ends."""
    return np.unique(
        np.linspace(0, count - 1, min(count, _SAMPLES)).astype(int)
    ).tolist()


def _name_type(value: Any) -> str:
    return type(value).__name__
