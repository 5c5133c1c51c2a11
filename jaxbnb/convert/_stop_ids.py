"""The tokens that end a text, as a Hugging Face folder's own configs name them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jaxbnb.convert import _safetensors
from jaxbnb.convert._errors import CheckpointError

# As transformers: where to look, and below which names the text model's own config is.
_FILES: Final = ("generation_config.json", "config.json")
_NESTED: Final = ("decoder", "generator", "text_config")
_NAME: Final = "eos_token_id"


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The first ``eos_token_id`` that names a token; empty where none does.

    ``generation_config.json`` comes before ``config.json``, and a field before the same
    field of a nested ``text_config``, as in transformers. It stops at the first file
    there is, and ends at no token, or in an error, where that has null or an empty
    list. Here the next one is asked.

    Args:
        folder: with either file or neither.

    Raises:
        CheckpointError: a file is damaged, or what it names is not a token.
    """
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        fields = _safetensors.parse_json(path, path.read_bytes())
        nested = next((fields[key] for key in _NESTED if fields.get(key)), {})
        for config in (fields, nested):
            if ids := _ids(path, config):
                return ids
    return ()


def _ids(path: Path, fields: Any) -> tuple[int, ...]:
    """One token, a list of them, or null."""
    ids = fields.get(_NAME) if isinstance(fields, Mapping) else None
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    # Tokens are int32 on the device.
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise CheckpointError(
            f"{path}: {_NAME} must be a token or a list of them, got {ids!r:.200}"
        )
    return tuple(dict.fromkeys(ids))
