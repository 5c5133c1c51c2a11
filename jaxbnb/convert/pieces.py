"""Files that are written tensor by tensor, and go on where they were interrupted."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxbnb.convert import journal, safetensors_files
from jaxbnb.convert.plan import TensorReport

Progress = Callable[[int, int, str], object]
# Puts an array at a byte of the file.
Write = Callable[[int, np.ndarray], None]
# Waits for arrays, writes them in their order, and returns the SQNR, or None.
Finish = Callable[[Write], float | None]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one tensor of the source becomes in a file.

    Attributes:
        report: of it, yet without an SQNR.
        regions: the first byte and the size of each part of the file that it fills.
        start: reads the tensor and starts its quantisation, as JAX computes while
            Python goes on; what it returns then writes all regions.
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
) -> None:
    """Writes a file, but for what the journal beside it tells of.

    The caller has made sure that both belong to this work, as `resumable_folder` does.
    The journal is left: it is the caller's to remove, once nothing needs it.

    Args:
        path: of the file.
        header: its first bytes.
        pieces: all the others.
        progress: as of `convert_checkpoint`.
        report: as of `convert_checkpoint`.
    """
    total, done = sum(size for piece in pieces for _, size in piece.regions), 0
    journal_path = path.with_name(journal.NAME)
    entries = journal.read(journal_path) if path.is_file() else {}

    def advance(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, name)

    # Unbuffered: a buffer would be flushed again when the file is closed, after its
    # first failure, and raise an error that names nothing.
    with path.open("r+b" if entries else "wb", buffering=0) as file:
        kept = {}
        for piece in pieces:
            entry = entries.get(piece.report.name)
            # The journal may have reached the disk before what it tells of.
            if entry and journal.checksum(file, piece.regions) == entry["crc"]:
                kept[piece.report.name] = entry
        journal.start(journal_path, kept)
        file.seek(0)
        safetensors_files.write_bytes(file, header)
        left = (piece for piece in pieces if piece.report.name not in kept)
        # One is quantised while the one before it is written.
        started = _ahead(piece.start() for piece in left)
        for piece in pieces:
            name, crc = piece.report.name, 0

            def write(first: int, array: np.ndarray, name: str = name) -> None:
                nonlocal crc
                file.seek(first)
                count = safetensors_files.write_bytes(file, array)
                crc = zlib.crc32(safetensors_files.raw(array), crc)
                advance(count, name)

            if name in kept:
                advance(sum(size for _, size in piece.regions), name)
                sqnr = kept[name]["sqnr"]
            else:
                sqnr = next(started)(write)
                journal.append(journal_path, {"name": name, "crc": crc, "sqnr": sqnr})
            if report is not None:
                report(dataclasses.replace(piece.report, sqnr=sqnr))
        # After the last region of a damaged file there may be bytes of no tensor.
        file.truncate(max([len(header), *(sum(r) for p in pieces for r in p.regions)]))


def _ahead(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, each made before the one before it is used.

    Example:
        >>> items = (print("made", i) or i for i in range(2))
        >>> for item in _ahead(items):
        ...     print("used", item)
        made 0
        made 1
        used 0
        used 1
    """
    last: list[_T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
