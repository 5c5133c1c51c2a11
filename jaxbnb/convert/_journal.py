"""The journal of a conversion: what is written already, if it is interrupted."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

NAME: Final = "conversion.journal"
# Bytes read at a time to check what a journal says.
_CHUNK: Final = 2**24


def fingerprint(source: Path, header: bytes, options: Mapping[str, Any]) -> str:
    """Of all that decides over the bytes to write: other work is not resumed."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    text = repr((os.fspath(source.resolve()), stats, sorted(options.items())))
    return hashlib.sha256(text.encode() + header).hexdigest()


def read(path: Path, mark: str) -> dict[str, dict[str, Any]]:
    """The entries of a journal by their names; none of another mark's.

    The last line may be half a line: the journal ends before it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    entries: dict[str, dict[str, Any]] = {}
    # What follows the last line break is empty, or was being written.
    for i, line in enumerate(lines[:-1]):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if i == 0:
            if entry != {"mark": mark}:
                break
        else:
            entries[entry["name"]] = entry
    return entries


def start(path: Path, mark: str, entries: Mapping[str, dict[str, Any]]) -> None:
    """Writes a journal anew, with the entries that are still true."""
    lines = [{"mark": mark}, *entries.values()]
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry, once what it tells of is written."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


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
