"""The two kinds of BPE in GGUF files: GPT-2's, over bytes, and SentencePiece's."""

from typing import Any, Final, NamedTuple

import numpy as np

from jaxbnb.convert import _gguf
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._tokenizers_library import library_errors

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Split(NamedTuple):
    """How to split a text before the bytes of each part are merged.

    Attributes:
        pattern: regular expression of a part; None for GPT-2's.
        is_digit_part: whether each digit is a part of its own.
        is_composed: whether characters are composed first (NFC).
        is_token_kept: whether a part that is a token stays whole, whatever the merges.
        has_bos: whether a text starts with the bos token if the file does not say so.
    """

    pattern: str | None = None
    is_digit_part: bool = False
    is_composed: bool = False
    is_token_kept: bool = False
    has_bos: bool = False


_LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By `tokenizer.ggml.pre`. llama.cpp names GPT-NeoX's after OLMo.
SPLITS: Final = {
    "gpt-2": Split(),
    "olmo": Split(),
    "smollm": Split(is_digit_part=True),
    "qwen2": Split(_LLAMA_3.replace("{1,3}", ""), is_composed=True),
    "llama-bpe": Split(_LLAMA_3, is_token_kept=True, has_bos=True),
}
_SPACE: Final = "▁"


def find_split(gguf: _gguf.Gguf) -> Split | None:
    """Returns how a file's tokenizer splits a text; None for SentencePiece.

    SentencePiece does not split.

    Raises:
        UnsupportedCheckpointError: the tokenizer is of neither kind, or splits in
            another way.
    """
    kind = gguf.metadata.get("tokenizer.ggml.model")
    split = gguf.metadata.get("tokenizer.ggml.pre", "gpt-2")
    # Compared as strings, because a corrupt file may have an array in their place.
    if str(kind) == "llama":
        return None
    if str(kind) != "gpt2" or str(split) not in SPLITS:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has a {kind!r:.60} tokenizer with the pre-tokenizer "
            f"{split!r:.60}; jaxbnb builds 'llama', and 'gpt2' with one of "
            f"{list(SPLITS)}. Use the tokenizer.json of the model's Hugging Face "
            "folder"
        )
    return SPLITS[str(split)]


def build_byte_level(gguf: _gguf.Gguf, split: Split, library: Any) -> Any:
    """Builds a `tokenizers.Tokenizer` over bytes, from the merges in the file."""
    tokens, _ = read_vocabulary(gguf)
    tokenizer = _build(
        gguf, tokens, _read_pairs(gguf), library, ignore_merges=split.is_token_kept
    )
    split_by = library.pre_tokenizers
    parts = []
    if split.pattern is not None:
        parts.append(split_by.Split(library.Regex(split.pattern), "isolated"))
    if split.is_digit_part:
        parts.append(split_by.Digits(individual_digits=True))
    has_prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix") is True
    parts.append(
        split_by.ByteLevel(add_prefix_space=has_prefix, use_regex=split.pattern is None)
    )
    tokenizer.pre_tokenizer = split_by.Sequence(parts)
    tokenizer.decoder = library.decoders.ByteLevel()
    if split.is_composed:
        tokenizer.normalizer = library.normalizers.NFC()
    return tokenizer


def build_sentence_piece(gguf: _gguf.Gguf, unknown: str | None, library: Any) -> Any:
    """Builds a `tokenizers.Tokenizer` over characters, from the scores of its tokens.

    SentencePiece joins the two neighbours that form the token with the highest score.
    BPE does the same when its merges are all pairs that form a token, ordered by score.
    A character without a token becomes the tokens of its bytes, or ``unknown``.
    """
    tokens, kinds = read_vocabulary(gguf)
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.scores does not have a number for each of "
            f"the {len(tokens)} tokens; the file is corrupt"
        )
    tokenizer = _build(
        gguf,
        tokens,
        _find_pairs(tokens, kinds, scores.tolist()),
        library,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    normalize, decode = library.normalizers, library.decoders
    spaces = [normalize.Replace(" ", _SPACE)]
    pieces = [decode.Replace(_SPACE, " "), decode.ByteFallback(), decode.Fuse()]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix") is not False:
        spaces.insert(0, normalize.Prepend(_SPACE))
        pieces.append(decode.Strip(" ", 1, 0))
    tokenizer.normalizer = normalize.Sequence(spaces)
    tokenizer.decoder = decode.Sequence(pieces)
    return tokenizer


def read_vocabulary(gguf: _gguf.Gguf) -> tuple[list[str], list[int]]:
    """Returns the tokens in the order of their ids, and the kind of each."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(
            f"{gguf.path} lacks tokenizer.ggml.tokens; use the tokenizer.json of the "
            "model's Hugging Face folder"
        )
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{gguf.path}: the vocabulary has a token twice")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return tokens, [NORMAL] * len(tokens)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.token_type does not have a number for each "
            f"of the {len(tokens)} tokens; the file is corrupt"
        )
    return tokens, kinds.tolist()


def _read_pairs(gguf: _gguf.Gguf) -> list[tuple[str, str]]:
    """Returns the pairs to merge, in order of priority."""
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(
            f"{gguf.path} lacks tokenizer.ggml.merges; use the tokenizer.json of the "
            "model's Hugging Face folder"
        )
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CheckpointError(
                f"{gguf.path}: a merge must be two tokens with a space between, got "
                f"{merge!r}"
            )
        pairs.append((left, right))
    return pairs


def _find_pairs(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that form a token, those of the best token first."""
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == NORMAL
    }
    pairs = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((-scores[i], ids[left], ids[right]))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]


def _build(
    gguf: _gguf.Gguf,
    tokens: list[str],
    pairs: list[tuple[str, str]],
    library: Any,
    **options: Any,
) -> Any:
    ids = {token: i for i, token in enumerate(tokens)}
    with library_errors(f"{gguf.path}: the merges do not fit the tokens"):
        return library.Tokenizer(library.models.BPE(ids, pairs, **options))
