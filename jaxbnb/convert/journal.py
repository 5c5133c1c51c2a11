"""The journal of a conversion: what it has written, in case it is interrupted."""

import hashlib
import importlib.metadata
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jaxbnb.convert._gguf import list_parts
from jaxbnb.core.files import atomic_write

NAME: Final = "conversion.journal"
# Bytes read at a time to verify a journal.
_CHUNK: Final = 2**24


def fingerprint(source: Path, header: bytes, options: Mapping[str, Any]) -> str:
    """Returns a hash of everything that determines the output of a conversion.

    Args:
        source: file or folder to convert. The hash includes the names, sizes and times
            of change of its files.
        header: header of the output file.
        options: all other options, including the kind of conversion.
    """
    files = sorted(source.iterdir()) if source.is_dir() else list_parts(source)
    stats = [(file.name, *_read_stat(file)) for file in files if file.is_file()]
    version = importlib.metadata.version("jaxbnb")
    text = repr((version, os.fspath(source.resolve()), stats, sorted(options.items())))
    return hashlib.sha256(text.encode() + header).hexdigest()


def _read_stat(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    # A copy may keep the time of modification, e.g. with `cp -p`, but not the other
    # two.
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the entries of a journal by name, up to the first damaged line.

    The last line may be incomplete, and after a crash any line may be damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    entries: dict[str, dict[str, Any]] = {}
    # Text after the last line break is empty or incomplete.
    for line in lines[:-1]:
        crc, _, text = line.partition(b" ")
        if crc != _compute_crc(text):
            break
        entry = json.loads(text)
        entries[entry["name"]] = entry
    return entries


def start(path: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Writes a new journal with the entries that are still valid."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(map(_make_line, entries.values())))


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry, after its tensor has been written."""
    with path.open("ab") as file:
        file.write(_make_line(entry))


def _make_line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return _compute_crc(text) + b" " + text + b"\n"


def _compute_crc(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def checksum(file: io.FileIO, regions: Sequence[tuple[int, int]]) -> int:
    """Returns the CRC-32 of ``(first, size)`` regions of a file, one after another.

    Returns -1 if the file is too short.
    """
    crc = 0
    for first, size in regions:
        file.seek(first)
        while size:
            data = file.read(min(size, _CHUNK))
            if not data:
                return -1
            crc, size = zlib.crc32(data, crc), size - len(data)
    return crc
