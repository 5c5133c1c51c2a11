"""Renders chats with Jinja templates, in the same environment as transformers."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import numpy as np

from jaxbnb.convert._errors import CheckpointError

_GENERATION: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Variable of a template's context in which a block finds how much comes before it.
_RENDERED: Final = "_rendered"


class RenderedChat(NamedTuple):
    """The text of a chat, and the parts of it that the assistant writes.

    Attributes:
        text: what the template renders.
        spans: start and end of each ``{% generation %}`` block, in characters; None if
            the template has no such blocks.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> RenderedChat:
    """Renders a chat.

    Args:
        template: source of a Jinja template.
        messages: messages of the chat.
        variables: everything else that the template may use: special tokens, tools, ...

    Raises:
        TypeError: a message or a variable contains something other than text, numbers,
            lists and dicts.
        CheckpointError: the template has a syntax error.
        ValueError: there are no messages, or the template refuses them.
    """
    if not messages:
        raise ValueError("there are no messages; a chat needs at least one")
    context = {"tools": None, "documents": None, "add_generation_prompt": True}
    context |= {name: _copy_plain(value, name) for name, value in variables.items()}
    context["messages"] = [_prepare(message) for message in messages]
    rendered = _Rendered()
    pieces = []
    try:
        for piece in _compile(template).generate(context | {_RENDERED: rendered}):
            pieces.append(piece)
            rendered.length += len(piece)
    except jinja2.TemplateSyntaxError as error:
        line = "".join(template.splitlines()[error.lineno - 1 : error.lineno]).strip()
        raise CheckpointError(
            f"the chat template has a syntax error in line {error.lineno}, "
            f"{line!r:.200}: {error.message}. Correct it in the checkpoint, e.g. in "
            "chat_template.jinja, or download that file again"
        ) from error
    except Exception as error:  # A template is a program: it may raise anything.
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    has_blocks = _GENERATION.search(template) is not None
    return RenderedChat("".join(pieces), tuple(rendered.spans) if has_blocks else None)


@dataclasses.dataclass
class _Rendered:
    """How much of a chat is rendered, and where the blocks so far lie."""

    length: int = 0
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def _prepare(message: Any) -> dict[str, Any]:
    """Drops fields that are None, and copies the reasoning to each of its names."""
    if not isinstance(message, Mapping):
        raise TypeError(
            f"a message must be a dict of role and content, got {message!r:.200}"
        )
    plain = _copy_plain(message, "messages")
    plain = {name: value for name, value in plain.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = [plain[name] for name in names if name in plain]
    if reasoning:
        plain = {"thinking": reasoning[0]} | plain
        plain["reasoning_content"] = reasoning[0]
    return plain


def _copy_plain(value: Any, name: str) -> Any:
    """Copies to JSON's types. A template could call methods of any other object."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {
            _copy_plain(key, name): _copy_plain(item, name)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_copy_plain(item, name) for item in value]
    raise TypeError(
        f"{name} must contain only text, numbers, lists and dicts, because a chat "
        f"template reads nothing else; got {type(value).__name__}"
    )


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # A template is a stranger's program. The sandbox confines it to plain data.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """Tags ``{% generation %}`` and ``{% endgeneration %}`` around assistant messages.

    They mark the text that a model is trained on, and render as that text. The body is
    a call block, so variables that are set inside are not visible afterwards.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(
        self, context: jinja2.runtime.Context, caller: Callable[[], str]
    ) -> str:
        text, rendered = caller(), context.get(_RENDERED)
        if isinstance(rendered, _Rendered):
            rendered.spans.append((rendered.length, rendered.length + len(text)))
        return text


class _Dict:
    """Python's ``dict``, reduced to the two methods that templates need."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace``, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON. Jinja's own filter would escape characters for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
