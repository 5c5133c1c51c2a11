"""load_tokenizer: text to tokens and back, by the files of a checkpoint."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jaxbnb.convert import _gguf
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._gguf_tokenizer import (
    build_tokenizer,
    read_chat_templates,
    read_special_tokens,
    read_stop_tokens,
)
from jaxbnb.convert._special_tokens import add_special_tokens, read_optional
from jaxbnb.convert._tokenizers_library import library_errors, read_tokenizer
from jaxbnb.convert.hub import find_checkpoint
from jaxbnb.core.extras import import_extra

if TYPE_CHECKING:
    import tokenizers

    from jaxbnb.convert._chat_template import RenderedChat

# Tokens decode to this while some bytes of a character are still missing.
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"
# Arguments of transformers' apply_chat_template that are not variables of a template,
# and what encode_chat does instead.
_NOT_VARIABLES: Final = {
    "conversation": "the messages are its first argument",
    "chat_template": "dataclasses.replace(tokenizer, chat_template=...) changes it",
    "continue_final_message": "it ends or opens messages as the template says",
    "tokenize": "encode_chat always returns tokens, and render_chat the text",
    "tokenizer_kwargs": "it returns the tokens of the whole text as they are",
    "sanitize_control_tokens": "a special token in a message counts as one",
    "padding": "it never pads; give generate padded rows with an attention_mask",
    "truncation": "it never truncates; slice the list that it returns",
    "max_length": "it never pads or truncates; slice the list that it returns",
    "return_tensors": "it returns a list; jnp.asarray(ids)[None] is a batch of one",
    "return_dict": "it returns a list of tokens",
    "return_assistant_tokens_mask": "it returns tokens without a mask; "
    "jaxbnb.data.Encoder returns both",
}
# Files of a Hugging Face folder. None of them is a tokenizer by itself.
_PARTS: Final = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")
# Parts of a config.json that may hold the config of the text model.
_NESTED: Final = ("decoder", "generator", "text_config")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A `tokenizers.Tokenizer`, with the checkpoint's settings for its use.

    Attributes:
        tokenizer: the tokenizer itself.
        stop_token_ids: tokens that end a text; pass them to `generate` as
            ``eos_token_id``.
        chat_template: Jinja template that turns messages into a prompt; a dict of
            several by name, e.g. "default" and "tool_use"; or None.
        special_tokens: tokens that the checkpoint names, for use in the template:
            "bos_token", "eos_token" and so on, and tokens that only this model has,
            e.g. "image_token".
    """

    tokenizer: "tokenizers.Tokenizer"
    stop_token_ids: tuple[int, ...]
    chat_template: str | Mapping[str, str] | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """Encodes a text, adding the special tokens that the checkpoint asks for.

        Raises:
            CheckpointError: the tokenizer is damaged in a way that only this text
                reveals.
            TypeError: ``text`` is not a string, e.g. a list of strings.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"encode takes one text at a time, a str; got {type(text).__name__}. "
                "For several: [tokenizer.encode(text) for text in texts]"
            )
        return self._encode(text, add_special_tokens=True)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> "list[tokenizers.Encoding]":
        """Encodes several texts at once, on all cores.

        Args:
            texts: the texts.
            add_special_tokens: whether to add those that the checkpoint asks for.
                Chats have them already.

        Returns:
            The tokens of each text as ``ids``, and the characters of each token as
            ``offsets``.

        Raises:
            CheckpointError: see `encode`.
        """
        with library_errors("the tokenizer cannot encode, because its file is damaged"):
            return self.tokenizer.encode_batch(
                list(texts), add_special_tokens=add_special_tokens
            )

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decodes tokens to text, leaving out special tokens.

        Raises:
            CheckpointError: see `encode`.
            TypeError: ``token_ids`` is a batch, as returned by `generate`.
        """
        ids = [_to_int(token) for token in token_ids]
        with library_errors("the tokenizer cannot decode, because its file is damaged"):
            return self.tokenizer.decode(ids)

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Yields text as soon as its characters are complete.

        Joined, the pieces are the result of `decode`.
        """
        ids: list[int] = []
        # Each token is decoded after some earlier ones, as its spaces depend on them.
        start = known = 0
        for token in token_ids:
            ids.append(_to_int(token))
            before, text = self.decode(ids[start:known]), self.decode(ids[start:])
            if len(text) > len(before) and not text.endswith(_INCOMPLETE):
                yield text[len(before) :]
                start, known = known, len(ids)
        before, text = self.decode(ids[start:known]), self.decode(ids[start:])
        if len(text) > len(before):
            yield text[len(before) :]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> list[int]:
        """Encodes a chat as a prompt for the assistant's next message.

        The arguments and errors are those of `render_chat`. A damaged tokenizer raises
        CheckpointError too.
        """
        # The template has added the special tokens already.
        text = self.render_chat(messages, **variables).text
        return self._encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> "RenderedChat":
        """Renders a chat as a prompt for the assistant's next message.

        Args:
            messages: messages with a "role" ("system", "user" or "assistant") and a
                "content".
            **variables: other variables of the template, e.g. ``tools`` (a list of JSON
                schemas), ``documents``, ``enable_thinking=False``, or
                ``add_generation_prompt=False`` for a chat that has ended. The remaining
                arguments of transformers' ``apply_chat_template``, e.g. ``padding``,
                are not variables of a template and are refused.

        Returns:
            The text, and the characters of its ``{% generation %}`` blocks as
            ``spans``, or None if the template has no such blocks.

        Raises:
            CheckpointError: the template has a syntax error.
            ImportError: jinja2 is not installed.
            TypeError: messages or variables hold something that JSON cannot express, or
                a variable is an argument of ``apply_chat_template`` only.
            ValueError: there is no ``chat_template``, or it refuses the messages.
        """
        foreign = [name for name in variables if name in _NOT_VARIABLES]
        if foreign:
            reasons = "; ".join(f"{name}: {_NOT_VARIABLES[name]}" for name in foreign)
            raise TypeError(
                "arguments of a chat go to its template, and these belong to "
                f"transformers' apply_chat_template; leave them out. {reasons}"
            )
        template = self._choose_template(variables.get("tools"))
        import_extra("jinja2", needed_by="a chat template", extra="generate")
        from jaxbnb.convert._chat_template import render_chat

        return render_chat(template, messages, {**self.special_tokens, **variables})

    def __repr__(self) -> str:
        templates = self.chat_template
        if isinstance(templates, Mapping):
            chat = f"chat templates {sorted(templates)}"
        else:
            chat = f"{'no' if templates is None else 'a'} chat template"
        return (
            f"Tokenizer({self.tokenizer.get_vocab_size():,} tokens, "
            f"stop_token_ids={self.stop_token_ids}, {chat})"
        )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with library_errors("the tokenizer cannot encode, because its file is damaged"):
            return self.tokenizer.encode(
                text, add_special_tokens=add_special_tokens
            ).ids

    def _choose_template(self, tools: Any) -> str:
        templates = self.chat_template
        if templates is None:
            raise ValueError(
                "this checkpoint has no chat template, so it is probably not a "
                "chat model; continue a plain text instead, e.g. with `jaxbnb generate`"
            )
        if isinstance(templates, str):
            return templates
        for name in ("default",) if tools is None else ("tool_use", "default"):
            if name in templates:
                return templates[name]
        raise ValueError(
            f"this checkpoint has the chat templates {sorted(templates)} and no "
            "default one; choose one: dataclasses.replace(tokenizer, "
            "chat_template=tokenizer.chat_template[name])"
        )


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None
) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Args:
        path: a Hugging Face folder with ``tokenizer.json``, or a GGUF file that
            `gguf_tokenizer` can read; or the name of a model on Hugging Face's hub, see
            `find_checkpoint`.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        ImportError: tokenizers is not installed.
        FileNotFoundError: ``path`` does not exist, or cannot be downloaded.
        CheckpointError: a file of the tokenizer is damaged, or ``path`` is a single
            file of a Hugging Face folder.
        UnsupportedCheckpointError: there is no tokenizer that jaxbnb can read.

    Example:
        >>> tokenizer = load_tokenizer("SmolLM2-135M-Instruct")  # doctest: +SKIP
        >>> messages = [{"role": "user", "content": "Hello!"}]
        >>> ids = tokenizer.encode_chat(messages)  # doctest: +SKIP
        >>> print(tokenizer.tokenizer.decode(ids, False))  # doctest: +SKIP
        <|im_start|>system
        You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
        <|im_start|>user
        Hello!<|im_end|>
        <|im_start|>assistant
    """
    path = find_checkpoint(path, revision=revision, has_weights=False)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix in _PARTS:
        raise CheckpointError(
            f"{path} is one file of a checkpoint; give its folder: {path.parent}"
        )
    gguf = _gguf.read_gguf(path)
    tokenizer = build_tokenizer(gguf)
    return Tokenizer(
        tokenizer=tokenizer,
        stop_token_ids=_find_ids(tokenizer, read_stop_tokens(gguf)),
        chat_template=read_chat_templates(gguf),
        special_tokens=read_special_tokens(gguf),
    )


def _load_folder(folder: Path) -> Tokenizer:
    library = import_extra("tokenizers", needed_by="load_tokenizer", extra="generate")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedCheckpointError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    tokenizer, pad = read_tokenizer(path, library)
    config = {"pad_token": pad} | read_optional(folder / "tokenizer_config.json")
    special = add_special_tokens(folder, config, tokenizer, library)
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    return Tokenizer(
        tokenizer=tokenizer,
        stop_token_ids=_read_stops(folder)
        or _find_ids(tokenizer, [special.get("eos_token")]),
        chat_template=_read_templates(folder, config),
        special_tokens=special,
    )


def _read_stops(folder: Path) -> tuple[int, ...]:
    """Reads the stop tokens from generation_config.json, else from config.json.

    Empty lists are skipped, and so are negative ids, which some files write for "none".
    """
    model = read_optional(folder / "config.json")
    nested = [model[name] for name in _NESTED if isinstance(model.get(name), dict)]
    for name, fields in (
        ("generation_config.json", read_optional(folder / "generation_config.json")),
        *(("config.json", part) for part in (model, *nested)),
    ):
        stops = fields.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        if not all(stop is None or type(stop) is int for stop in stops):
            raise CheckpointError(
                f"{folder / name}: eos_token_id must be a token or a list of them, "
                f"got {stops!r:.200}"
            )
        stops = [stop for stop in stops if stop is not None and stop >= 0]
        if stops:
            return tuple(dict.fromkeys(stops))
    return ()


def _read_templates(
    folder: Path, config: Mapping[str, Any]
) -> str | dict[str, str] | None:
    """Reads the templates from .jinja files, else from the first JSON file with any."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    templates = {
        name: _read_text(path)
        for name, path in (
            ("default", folder / "chat_template.jinja"),
            *((path.name.removesuffix(".jinja"), path) for path in files),
        )
        if path.is_file()
    }
    if templates:
        return templates["default"] if set(templates) == {"default"} else templates
    # The second file belongs to processors, for models that take more than text.
    old = folder / "chat_template.json"
    for path, fields in (
        (folder / "tokenizer_config.json", config),
        (old, read_optional(old)),
    ):
        if fields.get("chat_template") is not None:
            return _check_templates(path, fields["chat_template"])
    return None


def _check_templates(path: Path, found: Any) -> str | dict[str, str]:
    """Returns a template, or several by name.

    Files hold several as a dict by name, or as a list of names and templates.
    """
    if isinstance(found, str):
        return found
    pairs = found.items() if isinstance(found, dict) else ()
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        pairs = [(entry.get("name"), entry.get("template")) for entry in found]
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise CheckpointError(
            f"{path}: chat_template must be a string, or a list of objects with a name "
            f"and a template; got {found!r:.200}"
        )
    return dict(pairs)


def _to_int(token: Any) -> int:
    if np.ndim(token):
        raise TypeError(
            f"decode takes the tokens of one row; got rows, the first of shape "
            f"{np.shape(token)}. For a batch: [tokenizer.decode(row) for row in batch]"
        )
    return int(token)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error


def _find_ids(
    tokenizer: "tokenizers.Tokenizer", tokens: Iterable[str | None]
) -> tuple[int, ...]:
    ids = [tokenizer.token_to_id(token) for token in tokens if token is not None]
    return tuple(dict.fromkeys(token for token in ids if token is not None))
