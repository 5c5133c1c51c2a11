"""Protects the tokenizers library from damaged files.

Most damage makes the library raise. Some makes its Rust code panic, and some ends the
process, so this module looks for that damage before the library sees it.
"""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert.json_files import parse_json

if TYPE_CHECKING:
    import tokenizers

# A Unigram model keeps its tokens in a tree and frees it recursively, one call a byte:
# 16,000 bytes overflow the 256 KiB stack of a small thread, 4,000 do not.
_LONGEST_UNIGRAM: Final = 1000
_CHARSMAP: Final = "precompiled_charsmap"


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns the library's errors and panics into `CheckpointError`.

    The library raises plain Exception or ValueError, and PanicException, which is not
    an Exception and has no public name. Errors about a caller's argument have other
    types and pass through.

    Args:
        what: start of the message.
    """
    try:
        yield
    except BaseException as error:
        is_known = type(error) in (Exception, ValueError)
        if not is_known and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {error}") from error


def read_tokenizer(
    path: Path, library: Any
) -> "tuple[tokenizers.Tokenizer, str | None]":
    """Reads a ``tokenizer.json``.

    Saved settings for truncation and padding are ignored, as in transformers. They were
    meant for a single call, and would cut every text.

    Args:
        path: path of the file.
        library: the module `tokenizers`.

    Returns:
        The tokenizer, and the saved padding token or None.

    Raises:
        CheckpointError: the file is damaged.
    """
    fields = parse_json(path, path.read_bytes())
    padding = fields.get("padding")
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    fields |= {"truncation": None, "padding": None}
    _check_model(path, fields.get("model"))
    for charsmap in _find_charsmaps(fields.get("normalizer")):
        fault = find_fault(charsmap)
        if fault is not None:
            raise CheckpointError(
                f"{path}: the precompiled_charsmap of its normalizer {fault}; the file "
                "is corrupt, download it again"
            )
    # Serialised again, so that the library reads exactly what was checked.
    with library_errors(f"{path} is not a tokenizer"):
        tokenizer = library.Tokenizer.from_str(json.dumps(fields))
    return tokenizer, pad if isinstance(pad, str) else None


def _check_model(path: Path, model: Any) -> None:
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # Only a Unigram vocabulary is a list, of pairs of a token and its score.
    for pair in vocabulary if isinstance(vocabulary, list) else ():
        token = pair[0] if isinstance(pair, list) and pair else None
        if isinstance(token, str) and len(token) > _LONGEST_UNIGRAM:
            raise CheckpointError(
                f"{path}: a token has {len(token):,} characters, {token[:40]!r}..., "
                f"where at most {_LONGEST_UNIGRAM:,} are allowed; the file is corrupt, "
                "download it again"
            )


def _find_charsmaps(normalizer: Any) -> Iterator[Any]:
    """Yields the values of ``precompiled_charsmap`` at any depth."""
    if isinstance(normalizer, list):
        for part in normalizer:
            yield from _find_charsmaps(part)
    elif isinstance(normalizer, dict):
        # "type" alone does not decide: the library guesses a missing type.
        if normalizer.get("type") == "Precompiled" or _CHARSMAP in normalizer:
            yield normalizer.get(_CHARSMAP)
        for part in normalizer.values():
            yield from _find_charsmaps(part)


def find_fault(charsmap: Any) -> str | None:
    """Returns what is wrong with SentencePiece's map of characters, or None.

    The map consists of the length of a double-array trie in bytes, the trie in units of
    32 bits, and the zero-terminated texts that its leaves point to. The library follows
    a key through the trie without checking where it leads.

    References:
        Darts-clone, the double-array trie that SentencePiece uses.
    """
    try:
        data = base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError) as error:
        return f"is not base64 ({error})"
    size = int.from_bytes(data[:4], "little")
    # Units come in blocks of 256, because bytes of a key are xor-ed with positions.
    if size == 0 or size % 1024 or size > len(data) - 4:
        return f"announces a table of {size:,} bytes, but has {len(data):,} in all"
    units = np.frombuffer(data, "<u4", size // 4, offset=4)
    texts = data[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        return f"holds texts that are not UTF-8 ({error})"
    # Whether a text can start at each byte, which is not inside a character.
    starts = (np.frombuffer(texts + b"\0", np.uint8) & 0xC0) != 0x80
    return _walk(units, starts)


def _walk(units: np.ndarray, starts: np.ndarray) -> str | None:
    """Visits all nodes of a trie, level by level; returns what is wrong, or None."""
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    labels, has_leaf = units & 0x800000FF, units & 0x100 > 0
    keys = np.arange(1, 256, dtype=np.uint32)
    nodes, seen = offsets[:1], np.zeros(len(units), bool)
    while len(nodes):
        if nodes.max() >= len(units):
            return f"leads to unit {nodes.max():,} of {len(units):,}"
        seen[nodes] = True
        children = nodes[:, None] ^ keys
        children = children[labels[children] == keys]
        nodes = children ^ offsets[children]
        leaves = nodes[has_leaf[children]]
        leaves = leaves[leaves < len(units)]
        places = units[leaves] & 0x7FFFFFFF
        places = places[(places >= len(starts)) | ~starts[places % len(starts)]]
        if len(places):
            return f"has no text at byte {places[0]:,} of {len(starts) - 1:,}"
        nodes = np.unique(nodes)
        nodes = nodes[(nodes >= len(units)) | ~seen[nodes % len(units)]]
    return None
