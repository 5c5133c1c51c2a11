"""The journal of a conversion: what is written already, if it is interrupted."""

import hashlib
import importlib.metadata
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jaxbnb.core.files import atomic_write

NAME: Final = "conversion.journal"
# Bytes read at a time to check what a journal says.
_CHUNK: Final = 2**24


def fingerprint(source: Path, header: bytes, options: Mapping[str, Any]) -> str:
    """Returns a hash of everything that decides what a conversion writes.

    Args:
        source: file or folder that is converted. Its files count by their names,
            sizes and times of change.
        header: header of the file of tensors that is written.
        options: all other options, including the kind of conversion.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    stats = [(file.name, *_stat(file)) for file in files if file.is_file()]
    version = importlib.metadata.version("jaxbnb")
    text = repr((version, os.fspath(source.resolve()), stats, sorted(options.items())))
    return hashlib.sha256(text.encode() + header).hexdigest()


def _stat(file: Path) -> tuple[int, ...]:
    found = file.stat()
    # A copy may keep the time of modification, as `cp -p` does. No copy keeps the other
    # two.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a journal by their names, up to the first damaged line.

    The last line may be incomplete, and after a crash any line may be damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    entries: dict[str, dict[str, Any]] = {}
    # What follows the last line break is empty, or was being written.
    for line in lines[:-1]:
        crc, _, text = line.partition(b" ")
        if crc != _crc(text):
            break
        entry = json.loads(text)
        entries[entry["name"]] = entry
    return entries


def start(path: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Writes a journal anew, with the entries that are still true."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, entries.values())))


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry, once what it tells of is written."""
    with path.open("ab") as file:
        file.write(_line(entry))


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return _crc(text) + b" " + text + b"\n"


def _crc(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def checksum(file: io.FileIO, regions: Sequence[tuple[int, int]]) -> int:
    """The CRC-32 of ``(first, size)`` regions of a file, one after the other."""
    crc = 0
    for first, size in regions:
        file.seek(first)
        while size:
            data = file.read(min(size, _CHUNK))
            if not data:
                return -1
            crc, size = zlib.crc32(data, crc), size - len(data)
    return crc
