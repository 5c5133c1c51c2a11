"""load_dataset: rows of files or of memory, read in any order."""

import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from jaxbnb.data._errors import DataError
from jaxbnb.data._files import (
    BadRow,
    Rows,
    SequenceRows,
    fingerprint,
    hash_rows,
    open_rows,
)

# Bad rows to keep: enough to correct a file by hand.
_KEPT: Final = 1000
_SHOWN: Final = 5


class Dataset(Sequence[dict[str, Any]]):
    """Rows of one or several sources; `load_dataset` makes it.

    ``len(dataset)`` counts rows and ``dataset[i]`` reads one, in any order.

    Attributes:
        on_error: "raise" or "skip": what happens to bad rows.
        errors: rows that were left out, with their reasons; the first 1,000 of them.
        num_errors: number of rows that were left out.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        on_error: Literal["raise", "skip"],
        errors: Sequence[BadRow] = (),
        num_errors: int = 0,
    ):
        self.on_error = on_error
        self.errors = tuple(errors)
        self.num_errors = num_errors
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(rows) for rows in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        rows, place = self._find(index)
        return rows.read(place)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def describe(self, index: int) -> str:
        """Says where a row is, e.g. "speeches.jsonl, line 17".

        Rows without lines are counted from 0: "row 17" is ``rows[17]``.
        """
        rows, place = self._find(index)
        return rows.describe(place)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the number of rows and of samples of the contents.

        Datasets with equal contents have equal fingerprints, whatever the names of
        their files. A small file is covered in full, and of a large one, 64 parts of
        64 KiB with both ends. In memory, 64 rows are covered.
        """
        return fingerprint(self._sources)

    def shares_source(self, other: "Dataset") -> bool:
        """Whether a file, or a list of rows, of one has the same rows as in the other.

        64 rows of each are compared. Files may be of different kinds.
        """
        ours, theirs = (
            set(map(hash_rows, dataset._sources)) for dataset in (self, other)
        )
        return not ours.isdisjoint(theirs)

    def __repr__(self) -> str:
        left_out = f", {self.num_errors:,} left out" if self.num_errors else ""
        return f"Dataset({len(self):,} rows{left_out})"

    def _find(self, index: Any) -> tuple[Rows, int]:
        if isinstance(index, slice):
            raise TypeError("a dataset is read one row at a time, not in slices")
        try:
            position = range(len(self))[index]
        except IndexError:
            raise IndexError(f"row {index} of {len(self):,} rows") from None
        number = int(np.searchsorted(self._ends, position, side="right"))
        before = self._ends[number - 1] if number else 0
        return self._sources[number], int(position - before)


def load_dataset(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Dataset:
    """Opens data to train on.

    - ``.jsonl`` and ``.ndjson``: one JSON object a line; blank lines do not count. The
      file may be larger than memory. It is read once now, to check each line and to
      note where it starts, which takes 16 bytes a row. Later only the rows that are
      asked for are read.
    - ``.json``: a list of objects, in memory.
    - ``.txt`` and ``.md``: one row, with the whole file as ``text``.
    - ``.parquet``: its rows, in memory as Arrow's columns. It needs pyarrow.
    - A list of dicts, a split of a Hugging Face dataset, or another sequence of dicts.
    - Another iterable of dicts, which is read into memory now.

    Args:
        source: path of a file, a list of paths, or rows as above.
        on_error: what to do with lines that are not JSON objects: "raise" an error for
            the first, or "skip" them, count them and warn once. `Batches` does the same
            with rows that cannot be encoded.

    Returns:
        The rows, as a `Dataset`.

    Raises:
        DataError: the source is empty, or a row is bad; the message names its file and
            line.
        FileNotFoundError: a file does not exist.
        ImportError: pyarrow is not installed.
        TypeError: ``source`` is none of the above.
        ValueError: ``on_error`` is not one of its values.

    Example:
        >>> import os, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "speeches.jsonl"
        >>> lines = '{"text": "Four score"}', "", '{"text": "I have a dream"}'
        >>> _ = path.write_text(os.linesep.join(lines))
        >>> dataset = load_dataset(path)
        >>> len(dataset), dataset[1]
        (2, {'text': 'I have a dream'})
        >>> dataset.describe(1).removeprefix(f"{path.parent}/")
        'speeches.jsonl, line 3'
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    errors: list[BadRow] = []
    count = 0

    def on_bad(bad: BadRow) -> None:
        nonlocal count
        if on_error == "raise":
            raise DataError(
                f"{bad.place}: {bad.reason}. Correct it, or leave bad rows out with "
                "on_error='skip'"
            )
        count += 1
        if count <= _KEPT:
            errors.append(bad)

    sources = [
        open_rows(Path(part), on_bad)
        if isinstance(part, str | os.PathLike)
        else SequenceRows(part)
        for part in _split(source)
    ]
    if count:
        warnings.warn(_report(errors, count), stacklevel=2)
    dataset = Dataset(sources, on_error=on_error, errors=errors, num_errors=count)
    if len(dataset) == 0:
        reason = "all rows are bad" if count else "it is empty"
        raise DataError(f"{_name(source)} has no rows to train on: {reason}")
    # Rows in memory that are not dicts are found before a model is loaded.
    dataset[0]
    return dataset


def _split(source: Any) -> list[Any]:
    """Returns paths and sequences of rows."""
    if isinstance(source, str | os.PathLike):
        return [source]
    if isinstance(source, Mapping):
        raise TypeError(
            f"source is a dict of {', '.join(map(repr, list(source)[:5]))}; give one "
            "split of a Hugging Face dataset, or a list of rows"
        )
    if not isinstance(source, Iterable):
        raise TypeError(
            "source must be a path, a list of paths, or rows, got "
            f"{type(source).__name__}"
        )
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        source = list(source)
    if isinstance(source, list | tuple):
        are_paths = [isinstance(part, str | os.PathLike) for part in source]
        if source and all(are_paths):
            return list(source)
    return [source]


def _report(errors: list[BadRow], count: int) -> str:
    shown = [f"{bad.place}: {bad.reason}" for bad in errors[:_SHOWN]]
    if count > _SHOWN:
        shown.append(f"and {count - _SHOWN:,} more, see dataset.errors")
    rows = "1 row is" if count == 1 else f"{count:,} rows are"
    return f"{rows} left out:\n  " + "\n  ".join(shown)


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return type(source).__name__
