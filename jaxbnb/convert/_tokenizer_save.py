"""Tokenizers with more tokens, and as the files of a Hugging Face folder."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxbnb.convert._special_tokens import read_optional
from jaxbnb.convert._tokenizer import Tokenizer
from jaxbnb.convert._tokenizers_library import library_errors
from jaxbnb.convert.json_files import write_json
from jaxbnb.core.extras import import_extra


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer with more tokens. The given one stays as it is.

    Each new token is found anywhere in a text, and is never split. It is not a special
    token, so `Tokenizer.decode` keeps it. The ids follow those of the other tokens.

    Args:
        tokenizer: tokenizer to extend.
        tokens: texts of the new tokens.

    Raises:
        TypeError: ``tokens`` is one string instead of several.
        ValueError: a token is empty, occurs twice, or is in the vocabulary already.

    Example:
        >>> import jaxbnb
        >>> from tokenizers import Tokenizer, models
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
        >>> small = jaxbnb.convert.Tokenizer(words, (1,), None, {})
        >>> add_tokens(small, ["<|think|>"]).encode("b<|think|>b")
        [1, 2, 1]
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens must be several strings, such as [{tokens!r}]")
    if not tokens:
        return tokenizer
    library = import_extra("tokenizers", needed_by="add_tokens", extra="generate")
    old = tokenizer.tokenizer
    for index, token in enumerate(tokens):
        if not token.strip():
            raise ValueError(f"the new token {token!r} has no characters to find")
        if token in tokens[:index]:
            raise ValueError(f"the new token {token!r} occurs twice")
        known = old.token_to_id(token)
        if known is not None:
            raise ValueError(
                f"the new token {token!r} is in the vocabulary already, with the id "
                f"{known}"
            )
    new = library.Tokenizer.from_str(old.to_str())
    new.encode_special_tokens = old.encode_special_tokens
    with library_errors("the new tokens cannot be added"):
        new.add_tokens([library.AddedToken(t, normalized=False) for t in tokens])
    return replace(tokenizer, tokenizer=new)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer as files that `load_tokenizer` and transformers read.

    These are ``tokenizer.json``, ``tokenizer_config.json`` with the chat template and,
    if any token ends a text, ``generation_config.json``. The last keeps the other
    fields that it has.

    Args:
        tokenizer: tokenizer to write.
        folder: folder that exists; files with these names are replaced.

    Raises:
        OSError: writing failed.

    Example:
        >>> import pathlib, tempfile, jaxbnb
        >>> from tokenizers import Tokenizer, models
        >>> words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))
        >>> tokenizer = jaxbnb.convert.Tokenizer(
        ...     words, (1,), None, {"eos_token": "</s>"})
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> save_tokenizer(tokenizer, folder)
        >>> jaxbnb.convert.load_tokenizer(folder)
        Tokenizer(2 tokens, stop_token_ids=(1,), no chat template)
    """
    write_tokenizer(tokenizer, Path(folder))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, **fields: Any) -> None:
    """Does what `save_tokenizer` says, with more fields in tokenizer_config.json."""
    # tokenizer.save() raises errors that are not an OSError.
    text = tokenizer.tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
        **fields,
    }
    if tokenizer.tokenizer.encode_special_tokens:
        config["split_special_tokens"] = True
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        config["chat_template"] = templates
    elif templates is not None:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    write_json(folder / "tokenizer_config.json", config)
    if tokenizer.stop_token_ids:
        path = folder / "generation_config.json"
        stops = {"eos_token_id": list(tokenizer.stop_token_ids)}
        write_json(path, read_optional(path) | stops)
