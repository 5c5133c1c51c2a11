"""The tokenizer that a GGUF file carries in its metadata."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxbnb.convert import _gguf, _gguf_bpe
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert._tokenizers_library import library_errors
from jaxbnb.core.extras import import_extra

if TYPE_CHECKING:
    import tokenizers


def gguf_tokenizer(
    path: str | os.PathLike[str],
) -> "tuple[tokenizers.Tokenizer, str | None]":
    """Builds the tokenizer of a GGUF file.

    Args:
        path: a GGUF file. Its tokenizer must be SentencePiece's BPE, as in Llama 2,
            Mistral, Phi-3 and Gemma (``tokenizer.ggml.model`` is "llama"), or BPE over
            bytes ("gpt2") that splits a text like GPT-2, GPT-NeoX, SmolLM, Qwen 2 and 3
            or Llama 3.

    Returns:
        ``(tokenizer, chat_template)``: a `tokenizers.Tokenizer`, and the Jinja template
        that turns messages into a prompt (the default one, if there are several), or
        None if the file has no template.

    Raises:
        ImportError: tokenizers is not installed.
        CheckpointError: the file is not a sound GGUF file, or its tokens and merges
            disagree.
        UnsupportedCheckpointError: the tokenizer is of another kind.

    Example:
        >>> tokenizer, _ = gguf_tokenizer("SmolLM2.gguf")  # doctest: +SKIP
        >>> tokenizer.encode("In 1962, freedom").tokens  # doctest: +SKIP
        ['In', 'Ġ', '1', '9', '6', '2', ',', 'Ġfreedom']
    """
    gguf = _gguf.read_gguf(Path(path))
    templates = read_chat_templates(gguf)
    if isinstance(templates, dict):
        templates = templates.get("default")
    return build_tokenizer(gguf), templates


def read_context_length(gguf: _gguf.Gguf) -> int | None:
    """Returns the number of tokens that the model takes; None if the file is silent."""
    architecture = gguf.metadata.get("general.architecture")
    length = gguf.metadata.get(f"{architecture}.context_length")
    return length if isinstance(length, int) else None


def build_tokenizer(gguf: _gguf.Gguf) -> "tokenizers.Tokenizer":
    """Builds the tokenizer of an opened file; see `gguf_tokenizer`."""
    tokenizers = import_extra(
        "tokenizers", needed_by="gguf_tokenizer", extra="generate"
    )
    split = _gguf_bpe.find_split(gguf)
    tokens, kinds = _gguf_bpe.read_vocabulary(gguf)
    if split is None:
        unknown = _read_special_token(gguf, "unknown")
        tokenizer = _gguf_bpe.build_sentence_piece(gguf, unknown, tokenizers)
    else:
        tokenizer = _gguf_bpe.build_byte_level(gguf, split, tokenizers)
    for wanted, add in (
        (_gguf_bpe.CONTROL, tokenizer.add_special_tokens),
        (_gguf_bpe.USER_DEFINED, tokenizer.add_tokens),
    ):
        added = [t for t, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        with library_errors(f"{gguf.path}: its tokens cannot be added"):
            add([tokenizers.AddedToken(t, normalized=False) for t in added])
    defaults = {"bos": split is None or split.has_bos, "eos": False}
    _add_ends(gguf, tokenizer, defaults, tokenizers)
    return tokenizer


def _add_ends(
    gguf: _gguf.Gguf,
    tokenizer: "tokenizers.Tokenizer",
    defaults: dict[str, bool],
    library: Any,
) -> None:
    """Makes ``encode`` put bos and eos around a text where the file asks for them."""
    ends = {
        key: _read_special_token(gguf, key)
        for key, default in defaults.items()
        if gguf.metadata.get(f"tokenizer.ggml.add_{key}_token", default) is True
    }
    tokens = {key: token for key, token in ends.items() if token is not None}
    if not tokens:
        return
    template = [tokens.get("bos"), "$A", tokens.get("eos")]
    with library_errors(f"{gguf.path}: cannot put {[*tokens.values()]} around a text"):
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[piece for piece in template if piece is not None],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*tokens.values()}],
        )


def read_special_tokens(gguf: _gguf.Gguf) -> dict[str, str]:
    """Returns the special tokens by transformers' names: "bos_token", ..."""
    # The key for "sep" is misspelt in the files.
    keys = {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "pad": "padding",
        "sep": "seperator",
        "cls": "cls",
        "mask": "mask",
    }
    tokens = {
        f"{name}_token": _read_special_token(gguf, key) for name, key in keys.items()
    }
    return {name: token for name, token in tokens.items() if token is not None}


def read_stop_tokens(gguf: _gguf.Gguf) -> list[str]:
    """Returns the tokens that end a text, a turn ("eot") or a message ("eom")."""
    tokens = [_read_special_token(gguf, key) for key in ("eos", "eot", "eom")]
    return [token for token in dict.fromkeys(tokens) if token is not None]


def _read_special_token(gguf: _gguf.Gguf, key: str) -> str | None:
    """Returns the token with the id that the metadata gives, e.g. ``bos_token_id``."""
    tokens, _ = _gguf_bpe.read_vocabulary(gguf)
    index = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{gguf.path}: tokenizer.ggml.{key}_token_id is {str(index)[:60]}, but "
            f"the vocabulary has {len(tokens)} tokens"
        )
    return tokens[index]


def read_chat_templates(gguf: _gguf.Gguf) -> str | dict[str, str] | None:
    """Returns the Jinja template that turns messages into a prompt; several by name."""
    key = "tokenizer.chat_template"
    names = gguf.metadata.get("tokenizer.chat_templates")
    keys = {"default": key}
    if isinstance(names, list):
        keys |= {name: f"{key}.{name}" for name in names}
    found = {name: gguf.metadata.get(key) for name, key in keys.items()}
    texts = {name: text for name, text in found.items() if isinstance(text, str)}
    if set(texts) == {"default"}:
        return texts["default"]
    return texts or None
