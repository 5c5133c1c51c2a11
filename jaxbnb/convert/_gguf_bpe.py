"""The two kinds of BPE in GGUF files: of bytes, as GPT-2's, and SentencePiece's."""

from typing import Any, Final, NamedTuple

import numpy as np

from jaxbnb.convert import _gguf
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._tokenizers_library import library_errors

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Split(NamedTuple):
    """How a text is split, before bytes of its parts are merged.

    Attributes:
        pattern: what the parts match; None for GPT-2's.
        single_digits: whether each digit is a part.
        composes: whether characters are composed first (NFC).
        keeps_tokens: whether a part that is a token stays one, whatever the merges.
        adds_bos: whether a text starts with the first token, where the file is silent.
    """

    pattern: str | None = None
    single_digits: bool = False
    composes: bool = False
    keeps_tokens: bool = False
    adds_bos: bool = False


_LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By `tokenizer.ggml.pre`; llama.cpp calls GPT-NeoX's after OLMo.
SPLITS: Final = {
    "gpt-2": Split(),
    "olmo": Split(),
    "smollm": Split(single_digits=True),
    "qwen2": Split(_LLAMA_3.replace("{1,3}", ""), composes=True),
    "llama-bpe": Split(_LLAMA_3, keeps_tokens=True, adds_bos=True),
}
_SPACE: Final = "▁"


def split_of(gguf: _gguf.Gguf) -> Split | None:
    """How the tokenizer of a file splits a text; None for SentencePiece's, which don't.

    Raises:
        UnsupportedCheckpointError: it is of neither kind, or splits in another way.
    """
    kind = gguf.metadata.get("tokenizer.ggml.model")
    split = gguf.metadata.get("tokenizer.ggml.pre", "gpt-2")
    # As strings: an array has no hash and no single answer to ==.
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


def byte_level(gguf: _gguf.Gguf, split: Split, library: Any) -> Any:
    """A `tokenizers.Tokenizer` of bytes, whose merges the file has."""
    tokens, _ = vocabulary(gguf)
    tokenizer = _tokenizer(
        gguf, tokens, _pairs(gguf), library, ignore_merges=split.keeps_tokens
    )
    split_by = library.pre_tokenizers
    parts = []
    if split.pattern is not None:
        parts.append(split_by.Split(library.Regex(split.pattern), "isolated"))
    if split.single_digits:
        parts.append(split_by.Digits(individual_digits=True))
    prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix") is True
    parts.append(
        split_by.ByteLevel(add_prefix_space=prefix, use_regex=split.pattern is None)
    )
    tokenizer.pre_tokenizer = split_by.Sequence(parts)
    tokenizer.decoder = library.decoders.ByteLevel()
    if split.composes:
        tokenizer.normalizer = library.normalizers.NFC()
    return tokenizer


def sentence_pieces(gguf: _gguf.Gguf, unknown: str | None, library: Any) -> Any:
    """A `tokenizers.Tokenizer` of characters, whose merges the tokens' scores tell.

    SentencePiece joins the neighbours whose token has the highest score, which is what
    BPE does with all pairs that make a token, in the order of the scores. Characters
    that are no token become those of their bytes, or ``unknown``.
    """
    tokens, kinds = vocabulary(gguf)
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.scores has not a number for each of the "
            f"{len(tokens)} tokens; the file is corrupt"
        )
    tokenizer = _tokenizer(
        gguf,
        tokens,
        _scored_pairs(tokens, kinds, scores.tolist()),
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


def vocabulary(gguf: _gguf.Gguf) -> tuple[list[str], list[int]]:
    """The tokens by id, and what kind each is."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(
            f"{gguf.path} lacks tokenizer.ggml.tokens; use the tokenizer.json of the "
            "model's Hugging Face folder"
        )
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{gguf.path}: a token comes twice in the vocabulary")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return tokens, [NORMAL] * len(tokens)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.token_type does not have a number for each "
            f"of the {len(tokens)} tokens; the file is corrupt"
        )
    return tokens, kinds.tolist()


def _pairs(gguf: _gguf.Gguf) -> list[tuple[str, str]]:
    """The pairs to merge, first first."""
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
                f"{gguf.path}: a merge is two tokens with a space between, got "
                f"{merge!r}"
            )
        pairs.append((left, right))
    return pairs


def _scored_pairs(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, the best token's first."""
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


def _tokenizer(
    gguf: _gguf.Gguf,
    tokens: list[str],
    pairs: list[tuple[str, str]],
    library: Any,
    **options: Any,
) -> Any:
    ids = {token: i for i, token in enumerate(tokens)}
    with library_errors(f"{gguf.path}: the merges do not fit the tokens"):
        return library.Tokenizer(library.models.BPE(ids, pairs, **options))
