"""The tokenizers library, given files that may be damaged.

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

# A Unigram model keeps its tokens in a tree that it frees by recursion, a byte a call:
# 16,000 bytes overflow the 256 KiB stack of a small thread, 4,000 don't.
_LONGEST_UNIGRAM: Final = 1000
_CHARSMAP: Final = "precompiled_charsmap"


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns the library's complaints and panics into `CheckpointError`.

    It raises plain Exception or ValueError, and PanicException, which is not an
    Exception and has no public name. Errors for a caller's argument of a wrong type or
    range are of other types, and pass through.

    Args:
        what: start of the message.
    """
    try:
        yield
    except BaseException as error:
        known = type(error) in (Exception, ValueError)
        if not known and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {error}") from error


def read_tokenizer(
    path: Path, library: Any
) -> "tuple[tokenizers.Tokenizer, str | None]":
    """Reads a ``tokenizer.json``.

    The truncation and padding that it may have been saved with are off, as in
    transformers: they were meant for one call, and would cut every text.

    Args:
        path: the file.
        library: the module `tokenizers`.

    Returns:
        The tokenizer, and the token that it was saved to pad with; None for none.

    Raises:
        CheckpointError: the file is damaged.
    """
    fields = parse_json(path, path.read_bytes())
    padding = fields.get("padding")
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    fields |= {"truncation": None, "padding": None}
    _check_model(path, fields.get("model"))
    for charsmap in _charsmaps(fields.get("normalizer")):
        fault = find_fault(charsmap)
        if fault is not None:
            raise CheckpointError(
                f"{path}: the precompiled_charsmap of its normalizer {fault}; the file "
                "is corrupt, download it again"
            )
    # Written anew, so that the library reads exactly what was checked.
    with library_errors(f"{path} is not a tokenizer"):
        tokenizer = library.Tokenizer.from_str(json.dumps(fields))
    return tokenizer, pad if isinstance(pad, str) else None


def _check_model(path: Path, model: Any) -> None:
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # Only Unigram's is a list: pairs of a token and its score.
    for pair in vocabulary if isinstance(vocabulary, list) else ():
        token = pair[0] if isinstance(pair, list) and pair else None
        if isinstance(token, str) and len(token) > _LONGEST_UNIGRAM:
            raise CheckpointError(
                f"{path}: a token has {len(token):,} characters, {token[:40]!r}..., of "
                f"at most {_LONGEST_UNIGRAM:,}; the file is corrupt, download it again"
            )


def _charsmaps(normalizer: Any) -> Iterator[Any]:
    """The values of ``precompiled_charsmap``, at any depth of nested sequences."""
    if isinstance(normalizer, list):
        for part in normalizer:
            yield from _charsmaps(part)
    elif isinstance(normalizer, dict):
        # Whatever its "type" says: the library guesses a type that is missing.
        if normalizer.get("type") == "Precompiled" or _CHARSMAP in normalizer:
            yield normalizer.get(_CHARSMAP)
        for part in normalizer.values():
            yield from _charsmaps(part)


def find_fault(charsmap: Any) -> str | None:
    """Says what is wrong with SentencePiece's map of characters; None for nothing.

    The map is the length of a double-array trie in bytes, the trie in units of 32 bits,
    and the texts that its leaves point to, each ended by a zero. The library follows a
    key through the trie without checking where it leads.

    References:
        Darts-clone, the double-array trie that SentencePiece uses.
    """
    try:
        data = base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError) as error:
        return f"is not base64 ({error})"
    size = int.from_bytes(data[:4], "little")
    # Units come in blocks of 256, as bytes of a key are xor-ed with positions.
    if size == 0 or size % 1024 or size > len(data) - 4:
        return f"announces a table of {size:,} bytes, and has {len(data):,} in all"
    units = np.frombuffer(data, "<u4", size // 4, offset=4)
    texts = data[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        return f"holds texts that are not UTF-8 ({error})"
    # Whether a text can start at each byte: not in the middle of a character.
    starts = (np.frombuffer(texts + b"\0", np.uint8) & 0xC0) != 0x80
    return _walk(units, starts)


def _walk(units: np.ndarray, starts: np.ndarray) -> str | None:
    """Visits all nodes of a trie, level by level."""
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
