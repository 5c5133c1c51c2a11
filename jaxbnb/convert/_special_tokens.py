"""Tokens named in files next to tokenizer.json, looked up as transformers does."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert._tokenizers_library import library_errors
from jaxbnb.convert.json_files import parse_json

if TYPE_CHECKING:
    import tokenizers

_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA: Final = "extra_special_tokens"
# Their name in transformers 4.
_ADDITIONAL: Final = "additional_special_tokens"


def add_special_tokens(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: "tokenizers.Tokenizer",
    library: Any,
) -> dict[str, str]:
    """Adds the tokens that a folder names to its tokenizer.

    ``tokenizer_config.json`` names them. If it has no ``added_tokens_decoder``,
    ``special_tokens_map.json`` and ``added_tokens.json`` are read as well. A token that
    the tokenizer already has keeps its id and takes the flags from the files. A new
    token gets the next free id.

    Args:
        folder: folder of the checkpoint.
        config: contents of ``tokenizer_config.json``.
        tokenizer: tokenizer to extend.
        library: the module `tokenizers`.

    Returns:
        The named tokens by name: "bos_token" and so on, and tokens that only this model
        has, e.g. "image_token".

    Raises:
        CheckpointError: a file has something else where a token should be.
    """
    fields = _rename(config)
    if "added_tokens_decoder" not in fields:
        map_ = read_optional(folder / "special_tokens_map.json")
        fields = _rename(_merge(fields, map_))
    extra = fields.get(_EXTRA) or []
    if not isinstance(extra, list | dict):
        raise CheckpointError(
            f"{folder}: {_EXTRA} must be a list or an object of tokens, got "
            f"{extra!r:.200}"
        )
    extra_named, unnamed = (extra, []) if isinstance(extra, dict) else ({}, extra)
    named = {
        name: _make_token(folder, name, token, library)
        for name, token in (_find_named(fields) | extra_named).items()
    }
    unnamed = [_make_token(folder, _EXTRA, token, library) for token in unnamed]
    special = _get_contents([*named.values(), *unnamed])
    present = tokenizer.get_added_tokens_decoder()
    listed = _list_by_id(folder, fields, special, present, library)
    tokens = [listed[index] for index in sorted(listed)]
    known = _get_contents([*tokens, *present.values()])
    tokens += [t for t in (*named.values(), *unnamed) if t.content not in known]
    names = _get_contents(named.values())
    for token in tokens:
        token.special = token.special or token.content in names
    with library_errors(f"{folder}: its special tokens cannot be added"):
        tokenizer.add_tokens(tokens)
    return {name: token.content for name, token in named.items()}


def read_optional(path: Path) -> dict[str, Any]:
    """Reads a JSON file; returns an empty dict if there is none."""
    return parse_json(path, path.read_bytes()) if path.is_file() else {}


def _rename(fields: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    if not fields.get(_EXTRA) and _ADDITIONAL in fields:
        fields[_EXTRA] = fields.pop(_ADDITIONAL)
    return fields


def _merge(config: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Overrides fields of the config with the map of special tokens; joins lists."""
    special = {name: _mark(token) for name, token in special.items()}
    ours, theirs = config.get(_EXTRA) or [], special.get(_EXTRA)
    if isinstance(ours, list) and isinstance(theirs, list):
        special[_EXTRA] = ours + [token for token in theirs if token not in ours]
    return config | special


def _mark(value: Any) -> Any:
    """Marks tokens that are objects as special, because the map omits that flag."""
    if isinstance(value, list):
        return [_mark(token) for token in value]
    if isinstance(value, dict) and "content" in value:
        return value | {"special": True}
    return value


def _find_named(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the tokens that have a name, either a known one or this model's."""
    named = {name: fields[name] for name in _NAMES if fields.get(name) is not None}
    for name, token in fields.items():
        # Fields like "add_bos_token" are not tokens.
        if name.endswith("_token") and _is_token(token):
            named[name] = token
    return named


def _get_contents(tokens: Iterable[Any]) -> set[str]:
    return {token.content for token in tokens}


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _make_token(folder: Path, name: str, value: Any, library: Any) -> Any:
    """Makes a token from a string, or from an object with its content."""
    fields = {"content": value, "special": True} if isinstance(value, str) else value
    flags = {}
    if _is_token(value):
        flags = {flag: fields[flag] for flag in _FLAGS if flag in fields}
    if not _is_token(value) or not all(type(flag) is bool for flag in flags.values()):
        raise CheckpointError(
            f"{folder}: {name} in tokenizer_config.json or special_tokens_map.json: a "
            "token must be a string, or an object with its content and "
            f"{', '.join(_FLAGS)}, each true or false; got {value!r:.200}"
        )
    return _build_token(folder, fields["content"], library, **flags)


def _build_token(folder: Path, content: str, library: Any, **flags: bool) -> Any:
    try:
        return library.AddedToken(content, **flags)
    except UnicodeEncodeError as error:  # A lone surrogate, half of a character.
        raise CheckpointError(
            f"{folder}: the token {content!r:.200} is not text: {error}"
        ) from error


def _list_by_id(
    folder: Path,
    fields: dict[str, Any],
    special: set[str],
    present: dict[int, Any],
    library: Any,
) -> dict[int, Any]:
    """Returns tokens by the id that files give them; ids only determine the order."""
    name = "added_tokens_decoder"
    if name not in fields:
        return _read_ids(folder / "added_tokens.json", special, library) | present
    listed = fields[name]
    if not isinstance(listed, dict) or not all(
        key.isdecimal() and len(key) < 20 for key in listed
    ):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: {name} must be an object of tokens "
            f"by id, got {listed!r:.200}"
        )
    return {
        int(key): _make_token(folder, name, token, library)
        for key, token in listed.items()
    }


def _read_ids(path: Path, special: set[str], library: Any) -> dict[int, Any]:
    """Reads tokens by id from an ``added_tokens.json``."""
    ids = read_optional(path)
    if not all(type(index) is int for index in ids.values()):
        raise CheckpointError(f"{path}: token ids must be ints, got {ids!r:.200}")
    return {
        index: _build_token(
            path.parent,
            token,
            library,
            normalized=token not in special,
            special=token in special,
        )
        for token, index in ids.items()
    }
