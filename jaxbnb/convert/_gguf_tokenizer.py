"""The tokenizer that a GGUF file carries in its metadata."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxbnb.convert import _gguf, _gguf_bpe
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.core._optional import import_extra

if TYPE_CHECKING:
    import tokenizers


def gguf_tokenizer(
    path: str | os.PathLike[str],
) -> "tuple[tokenizers.Tokenizer, str | None]":
    """Builds the tokenizer of a GGUF file.

    Args:
        path: a GGUF file. Its tokenizer is SentencePiece's BPE, as of Llama 2, Mistral,
            Phi-3 and Gemma (``tokenizer.ggml.model`` is "llama"), or BPE of bytes
            ("gpt2") that splits a text as GPT-2, GPT-NeoX, SmolLM, Qwen 2 and 3 or
            Llama 3 do.

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
    split = _gguf_bpe.split_of(gguf)
    tokens, kinds = _gguf_bpe.vocabulary(gguf)
    if split is None:
        unknown = special_token(gguf, "unknown")
        tokenizer = _gguf_bpe.sentence_pieces(gguf, unknown, tokenizers)
    else:
        tokenizer = _gguf_bpe.byte_level(gguf, split, tokenizers)
    for wanted, add in (
        (_gguf_bpe.CONTROL, tokenizer.add_special_tokens),
        (_gguf_bpe.USER_DEFINED, tokenizer.add_tokens),
    ):
        added = [t for t, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        add([tokenizers.AddedToken(t, normalized=False) for t in added])
    defaults = {"bos": split is None or split.adds_bos, "eos": False}
    _add_ends(gguf, tokenizer, defaults, tokenizers)
    return tokenizer


def _add_ends(
    gguf: _gguf.Gguf,
    tokenizer: "tokenizers.Tokenizer",
    defaults: dict[str, bool],
    library: Any,
) -> None:
    """Has encode() put the tokens around a text that the file asks for."""
    ends = {
        key: special_token(gguf, key)
        for key, default in defaults.items()
        if gguf.metadata.get(f"tokenizer.ggml.add_{key}_token", default) is True
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
