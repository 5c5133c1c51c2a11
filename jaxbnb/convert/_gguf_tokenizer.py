"""The tokenizer that a GGUF file carries in its metadata: byte-level BPE."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jaxbnb.convert import _gguf
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.core._optional import import_extra

if TYPE_CHECKING:
    import tokenizers

# What splits text before the merges: whether digits stand singly.
_SINGLE_DIGITS: Final = {"smollm": True, "gpt-2": False}
_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(
    path: str | os.PathLike[str],
) -> "tuple[tokenizers.Tokenizer, str | None]":
    """Builds the tokenizer of a GGUF file.

    Args:
        path: a GGUF file whose tokenizer is byte-level BPE (``tokenizer.ggml.model`` of
            "gpt2") with the pre-tokenizer "smollm" or "gpt-2".

    Returns:
        ``(tokenizer, chat_template)``: a `tokenizers.Tokenizer` and the Jinja template
        that makes a prompt of messages, or None where the file has none.

    Raises:
        ImportError: tokenizers is not installed.
        CheckpointError: the file is no sound GGUF, or its tokens and merges disagree.
        UnsupportedCheckpointError: another kind of tokenizer.

    Example:
        >>> tokenizer, _ = gguf_tokenizer("SmolLM2.gguf")  # doctest: +SKIP
        >>> tokenizer.encode("In 1962, freedom").tokens  # doctest: +SKIP
        ['In', 'Ġ', '1', '9', '6', '2', ',', 'Ġfreedom']
    """
    gguf = _gguf.read_gguf(Path(path))
    return build_tokenizer(gguf), chat_template(gguf)


def save_tokenizer(path: Path, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a GGUF's tokenizer.

    Raises:
        As `gguf_tokenizer`.
    """
    gguf = _gguf.read_gguf(path)
    # Its own save() raises errors that are no OSError.
    text = build_tokenizer(gguf).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= special_tokens(gguf)
    length = f"{gguf.metadata.get('general.architecture')}.context_length"
    if length in gguf.metadata:
        config["model_max_length"] = gguf.metadata[length]
    template = chat_template(gguf)
    if template is not None:
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(gguf: _gguf.Gguf) -> "tokenizers.Tokenizer":
    """The tokenizer of an opened file; see `gguf_tokenizer`."""
    tokenizers = import_extra(
        "tokenizers", needed_by="gguf_tokenizer", extra="generate"
    )
    kind = gguf.metadata.get("tokenizer.ggml.model")
    split = gguf.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in _SINGLE_DIGITS:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has a tokenizer of the kind {kind!r} with the pre-tokenizer "
            f"{split!r}; jaxbnb builds 'gpt2' with one of {list(_SINGLE_DIGITS)}. Use "
            "the tokenizer.json of the model's Hugging Face folder"
        )
    tokens, kinds, merges = _vocabulary(gguf)
    try:
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={token: i for i, token in enumerate(tokens)}, merges=merges
            )
        )
    except Exception as error:  # The library raises nothing narrower.
        raise CheckpointError(
            f"{gguf.path}: the merges do not fit the tokens: {error}"
        ) from error
    byte_level = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=gguf.metadata.get("tokenizer.ggml.add_space_prefix") is True
    )
    if _SINGLE_DIGITS[split]:
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [digits, byte_level]
        )
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for wanted, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        added = [t for t, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        add([tokenizers.AddedToken(t, normalized=False) for t in added])
    _add_ends(gguf, tokenizer, tokenizers)
    return tokenizer


def _vocabulary(
    gguf: _gguf.Gguf,
) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """The tokens by id, what kind each is, and the pairs to merge, first first."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(
            f"{gguf.path} lacks tokenizer.ggml.tokens or tokenizer.ggml.merges; use "
            "the tokenizer.json of the model's Hugging Face folder"
        )
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{gguf.path}: a token comes twice in the vocabulary")
    kinds = np.ravel(gguf.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{gguf.path}: {len(tokens)} tokens and {len(kinds)} tokenizer.ggml."
            "token_type; the file is corrupt"
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
    return tokens, kinds.tolist(), pairs


def _add_ends(
    gguf: _gguf.Gguf, tokenizer: "tokenizers.Tokenizer", library: Any
) -> None:
    """Has encode() put the tokens around a text that the file asks for."""
    ends = {
        key: special_token(gguf, key)
        for key in ("bos", "eos")
        if gguf.metadata.get(f"tokenizer.ggml.add_{key}_token") is True
    }
    tokens = {key: token for key, token in ends.items() if token is not None}
    if tokens:
        template = [tokens.get("bos"), "$A", tokens.get("eos")]
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[piece for piece in template if piece is not None],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*tokens.values()}],
        )


def special_tokens(gguf: _gguf.Gguf) -> dict[str, str]:
    """Those that the metadata names, under transformers' names: "bos_token", ..."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = {f"{name}_token": special_token(gguf, key) for name, key in keys.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def special_token(gguf: _gguf.Gguf, key: str) -> str | None:
    """The token whose id the metadata gives, e.g. as ``bos_token_id``."""
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    index = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.{key}_token_id is {index!r}; the vocabulary "
            f"has {len(tokens)} tokens"
        )
    return tokens[index]


def chat_template(gguf: _gguf.Gguf) -> str | None:
    """The Jinja template that makes a prompt of messages, if the file has one."""
    template = gguf.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None
