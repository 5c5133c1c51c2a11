"""Writes a file tensor by tensor, and resumes after an interruption."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxbnb.convert import journal, safetensors_files
from jaxbnb.convert.plan import TensorReport

Progress = Callable[[int, int, str], object]
# Writes an array at a byte of the file.
Write = Callable[[int, np.ndarray], None]
# Waits for the arrays of a tensor, writes them in order, and returns the SQNR or None.
Finish = Callable[[Write], float | None]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The parts of a file that one tensor of the source fills.

    Attributes:
        report: report on the tensor, without an SQNR.
        regions: the first byte and the size of each part.
        start: function that reads the tensor and starts to quantise it (JAX computes
            asynchronously). Returns a function that writes all regions.
    """

    report: TensorReport
    regions: Sequence[tuple[int, int]]
    start: Callable[[], Finish]


def write_pieces(
    path: Path,
    header: bytes,
    pieces: Sequence[Piece],
    progress: Progress | None,
    report: Callable[[TensorReport], object] | None,
    journal_name: str = journal.NAME,
) -> None:
    """Writes a file, except for the pieces that its journal lists as written.

    The caller has made sure, e.g. with `resumable_folder`, that file and journal belong
    to this conversion. The caller also removes the journal in the end.

    Args:
        path: path of the file.
        header: first bytes of the file.
        pieces: everything else in the file.
        progress: see `convert_checkpoint`.
        report: see `convert_checkpoint`.
        journal_name: name of the journal, which is next to the file.
    """
    total, done = sum(size for piece in pieces for _, size in piece.regions), 0
    journal_path = path.with_name(journal_name)
    entries = journal.read(journal_path) if path.is_file() else {}

    def advance(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, name)

    # Unbuffered, because after a failed write, closing the file would flush the buffer
    # again and raise an error without a file name.
    with path.open("r+b" if entries else "wb", buffering=0) as file:
        kept = {}
        for piece in pieces:
            entry = entries.get(piece.report.name)
            # The journal may have reached the disk before the tensor did.
            if entry and journal.checksum(file, piece.regions) == entry["crc"]:
                kept[piece.report.name] = entry
        journal.start(journal_path, kept)
        file.seek(0)
        safetensors_files.write_bytes(file, header)
        left = (piece for piece in pieces if piece.report.name not in kept)
        # Each piece is quantised while the one before it is written.
        started = _run_ahead(piece.start() for piece in left)
        for piece in pieces:
            name, crc = piece.report.name, 0

            def write(first: int, array: np.ndarray, name: str = name) -> None:
                nonlocal crc
                file.seek(first)
                count = safetensors_files.write_bytes(file, array)
                crc = zlib.crc32(safetensors_files.view_bytes(array), crc)
                advance(count, name)

            if name in kept:
                advance(sum(size for _, size in piece.regions), name)
                sqnr = kept[name]["sqnr"]
            else:
                sqnr = next(started)(write)
                journal.append(journal_path, {"name": name, "crc": crc, "sqnr": sqnr})
            if report is not None:
                report(dataclasses.replace(piece.report, sqnr=sqnr))
        # A damaged file may have more bytes after the last region.
        file.truncate(max([len(header), *(sum(r) for p in pieces for r in p.regions)]))


def _run_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yields the same items, but computes each one before yielding its predecessor.

    Example:
        >>> items = (print("computed", i) or i for i in range(2))
        >>> for item in _run_ahead(items):
        ...     print("used", item)
        computed 0
        computed 1
        used 0
        used 1
    """
    last: list[_T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
