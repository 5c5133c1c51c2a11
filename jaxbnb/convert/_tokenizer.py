"""load_tokenizer: text to tokens and back, as a checkpoint's own files say."""

import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jaxbnb.convert import _gguf, _safetensors
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._gguf_tokenizer import (
    build_tokenizer,
    chat_template,
    special_token,
    special_tokens,
)
from jaxbnb.core._optional import import_extra

if TYPE_CHECKING:
    import tokenizers

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
# What decodes to this has bytes of a character whose others are still to come.
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer`, and what a checkpoint says of its use.

    Attributes:
        tokenizer: what splits and joins.
        stop_token_ids: the tokens that end a text; give them to `generate` as its
            ``eos_token_id``.
        chat_template: the Jinja template that makes a prompt of messages, or None.
        special_tokens: of those that the checkpoint names, "bos_token", "eos_token",
            "unk_token" and "pad_token", for the template.
    """

    tokenizer: "tokenizers.Tokenizer"
    stop_token_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those around it that the checkpoint asks for."""
        return self.tokenizer.encode(text).ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode([int(token) for token in token_ids])

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as whole characters are known; joined, `decode`."""
        ids: list[int] = []
        # Tokens are decoded with some before them, on which their spaces depend.
        start = known = 0
        for token in token_ids:
            ids.append(int(token))
            before, text = self.decode(ids[start:known]), self.decode(ids[start:])
            if len(text) > len(before) and not text.endswith(_INCOMPLETE):
                yield text[len(before) :]
                start, known = known, len(ids)
        before, text = self.decode(ids[start:known]), self.decode(ids[start:])
        if len(text) > len(before):
            yield text[len(before) :]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a prompt for the assistant's next message.

        Args:
            messages: each with a "role" ("system", "user" or "assistant") and its
                "content".

        Raises:
            ImportError: jinja2 is not installed.
            ValueError: there is no ``chat_template``, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template, so it is hardly a model for "
                "chats; continue a plain text instead, e.g. with `jaxbnb generate`"
            )
        text = _render(self.chat_template, messages, self.special_tokens)
        # The template has them already.
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer that lies with a model.

    Args:
        path: a Hugging Face folder with ``tokenizer.json``, or a GGUF file that
            `gguf_tokenizer` can read.

    Raises:
        ImportError: tokenizers is not installed.
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: a file of the tokenizer is damaged.
        UnsupportedCheckpointError: there is no tokenizer that jaxbnb reads.

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
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    gguf = _gguf.read_gguf(path)
    tokenizer = build_tokenizer(gguf)
    # "eot" is what a model for chats ends its messages with, where that is another.
    stops = [special_token(gguf, "eos"), special_token(gguf, "eot")]
    return Tokenizer(
        tokenizer=tokenizer,
        stop_token_ids=_ids(tokenizer, stops),
        chat_template=chat_template(gguf),
        special_tokens=special_tokens(gguf),
    )


def _load_folder(folder: Path) -> Tokenizer:
    library = import_extra("tokenizers", needed_by="load_tokenizer", extra="generate")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedCheckpointError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise CheckpointError(f"{path} is no tokenizer: {error}") from error
    config = _read_optional(folder / "tokenizer_config.json")
    special = {name: _content(config.get(name)) for name in _SPECIAL}
    special = {name: token for name, token in special.items() if token is not None}
    return Tokenizer(
        tokenizer=tokenizer,
        stop_token_ids=_stops(folder, tokenizer, special.get("eos_token")),
        chat_template=_folder_template(folder, config),
        special_tokens=special,
    )


def _stops(
    folder: Path, tokenizer: "tokenizers.Tokenizer", eos: str | None
) -> tuple[int, ...]:
    """What generation_config.json says, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        stops = _read_optional(folder / name).get("eos_token_id")
        if stops is not None:
            stops = stops if isinstance(stops, list) else [stops]
            if not all(type(stop) is int and stop >= 0 for stop in stops):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id must be a token or a list of them, "
                    f"got {stops!r:.200}"
                )
            return tuple(stops)
    return _ids(tokenizer, [eos])


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several, by name.
        by_name = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, got "
            f"{type(template).__name__}"
        )
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    return _safetensors.parse_json(path, path.read_bytes()) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token is a string, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(
    tokenizer: "tokenizers.Tokenizer", tokens: Iterable[str | None]
) -> tuple[int, ...]:
    ids = [tokenizer.token_to_id(token) for token in tokens if token is not None]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
) -> str:
    """A chat as text, with the names that transformers gives to templates."""
    options = {"needed_by": "a chat template", "extra": "generate"}
    jinja2 = import_extra("jinja2", **options)
    sandbox = import_extra("jinja2.sandbox", **options)
    # A template is somebody's program: the sandbox keeps it to strings and lists.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
        )
    except Exception as error:  # It may raise whatever a program can.
        raise ValueError(f"the chat template refuses the messages: {error}") from error
