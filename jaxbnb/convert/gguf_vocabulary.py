"""Describes a tokenizer as the metadata of a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxbnb.convert import _gguf, _gguf_bpe
from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.convert._gguf_tokenizer import build_tokenizer
from jaxbnb.convert._tokenizer import Tokenizer, load_tokenizer

_UNKNOWN, _UNUSED, _BYTE = 2, 5, 6
# Texts that tokenizers split in different ways.
_PROBE: Final = (
    "Hello world! It's 3.14159 or 20,000; we'll see, WE'LL SEE. I'm\n\n\n  here\t\tnow "
    "\n \n\r\n  (x+1)==y2 // @user #tag https://a.b/c?d=1 ...!!! e\u0301 \u00e9cole "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\U0001f600\U0001f468\u200d\U0001f4bb \u0e2a\u0e27 12345678 1\u00bd trailing  ",
    "leading",
    "  two spaces lead",
)


def read_vocabulary_fields(path: Path, vocab_size: int) -> dict[str, Any]:
    """Returns the metadata ``tokenizer.*`` for the tokenizer of a checkpoint.

    Args:
        path: a Hugging Face folder, or a GGUF file, which has the metadata already.
        vocab_size: number of rows of the embedding. Rows without a token get one that
            no text has.

    Raises:
        UnsupportedCheckpointError: llama.cpp would split texts in another way, as far
            as is known here.
        ImportError: tokenizers is not installed.
    """
    if path.is_file():
        metadata = _gguf.read_gguf(path).metadata
        return {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    tokenizer = load_tokenizer(path)
    fields = json.loads(tokenizer.tokenizer.to_str())
    if fields["model"]["type"] != "BPE":
        raise UnsupportedCheckpointError(
            f"{path} has a {fields['model']['type']} tokenizer; jaxbnb writes GGUF "
            "files with BPE tokenizers"
        )
    common = _describe_tokens(path, fields, vocab_size) | _describe_special(tokenizer)
    for candidate in _list_candidates(fields, common):
        if _encodes_alike(path, candidate, tokenizer):
            return candidate
    raise UnsupportedCheckpointError(
        f"{path} has a tokenizer that splits texts in a way that jaxbnb does not know "
        f"from GGUF files; it knows SentencePiece's, and {list(_gguf_bpe.SPLITS)}. "
        "llama.cpp's convert_hf_to_gguf.py may know it"
    )


def _describe_tokens(
    path: Path, fields: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """Returns the tokens, and the kind of each."""
    tokens = {i: token for token, i in fields["model"]["vocab"].items()}
    unknown, has_bytes = fields["model"]["unk_token"], fields["model"]["byte_fallback"]
    kinds = dict.fromkeys(tokens, _gguf_bpe.NORMAL)
    kinds |= {i: _UNKNOWN for i, token in tokens.items() if token == unknown}
    if has_bytes:
        bytes_ = {f"<0x{i:02X}>" for i in range(256)}
        kinds |= {i: _BYTE for i, token in tokens.items() if token in bytes_}
    for added in fields["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if kinds.get(added["id"]) != _UNKNOWN:
            is_control = added["special"]
            kinds[added["id"]] = (
                _gguf_bpe.CONTROL if is_control else _gguf_bpe.USER_DEFINED
            )
    if max(tokens, default=-1) >= vocab_size:
        raise UnsupportedCheckpointError(
            f"{path}: the tokenizer has a token with the id {max(tokens)}, and the "
            f"model only {vocab_size} tokens; resize_token_embeddings adds rows"
        )
    ids = range(vocab_size)
    return {
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in ids],
        "tokenizer.ggml.token_type": [kinds.get(i, _UNUSED) for i in ids],
    }


def _describe_special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of special tokens, the tokens around a text, and the template."""
    find, fields = tokenizer.tokenizer.token_to_id, {}
    # The key for "sep" is misspelt in the files.
    for name, key in (
        *((name, name) for name in ("bos", "eos", "cls", "mask")),
        *(("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")),
    ):
        token = tokenizer.special_tokens.get(f"{name}_token")
        index = None if token is None else find(token)
        if index is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = index
    eos = fields.get("tokenizer.ggml.eos_token_id")
    stops = [stop for stop in tokenizer.stop_token_ids if stop != eos]
    if eos is None and stops:
        fields["tokenizer.ggml.eos_token_id"] = stops.pop(0)
    for name, stop in zip(("eot", "eom"), stops, strict=False):
        fields[f"tokenizer.ggml.{name}_token_id"] = stop
    text = _PROBE[0]
    plain = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    around = tokenizer.encode(text)
    before = int(around[: len(plain)] != plain)
    fields["tokenizer.ggml.add_bos_token"] = bool(before)
    fields["tokenizer.ggml.add_eos_token"] = len(around) > before + len(plain)
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        fields["tokenizer.chat_template"] = templates
    elif templates is not None:
        others = sorted(set(templates) - {"default"})
        fields |= {f"tokenizer.chat_template.{n}": templates[n] for n in others}
        fields["tokenizer.chat_templates"] = others
        if "default" in templates:
            fields["tokenizer.chat_template"] = templates["default"]
    return fields


def _list_candidates(
    fields: Mapping[str, Any], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the metadata of every tokenizer with these tokens and merges."""
    merges = [
        m if isinstance(m, list) else m.split(" ") for m in fields["model"]["merges"]
    ]
    if fields["model"]["byte_fallback"]:
        scores = _score_tokens(common["tokenizer.ggml.tokens"], merges)
        start = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
        return [
            {**start, **common, "tokenizer.ggml.add_space_prefix": has_prefix}
            for has_prefix in (True, False)
        ]
    start = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
    return [{**start, **common, "tokenizer.ggml.pre": n} for n in _gguf_bpe.SPLITS]


def _score_tokens(
    tokens: Sequence[str], merges: Sequence[Sequence[str]]
) -> list[float]:
    """Returns a score for each token: earlier merges have higher ones."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _encodes_alike(path: Path, metadata: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a reader of the file would split the probe like the tokenizer."""
    metadata = dict(metadata)
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in metadata:
            metadata[key] = np.asarray(metadata[key])
    rebuilt = build_tokenizer(_gguf.Gguf(path, metadata, {}))
    return all(
        rebuilt.encode(text).ids == tokenizer.encode(text)
        and rebuilt.decode(rebuilt.encode(text).ids)
        == tokenizer.decode(tokenizer.encode(text))
        for text in _PROBE
    )
