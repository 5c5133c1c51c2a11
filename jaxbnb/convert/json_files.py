"""JSON files: parsed with errors that name the file, and written for people."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxbnb.convert._errors import CheckpointError


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object that has no key twice.

    Raises:
        CheckpointError: the text is not such an object; the message names ``path``.
    """
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        collected = dict(pairs)
        if len(collected) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            duplicates.extend(key for key, count in counts.items() if count > 1)
        return collected

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); the file is corrupt"
        ) from error
    if duplicates:
        raise CheckpointError(f"{path}: these names come twice: {duplicates[:5]}")
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(parsed).__name__}"
        )
    return parsed


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes JSON that people can read."""
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    # JSON can contain a lone surrogate, UTF-8 cannot, so it is written as an escape.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
