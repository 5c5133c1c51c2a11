"""Chats as text, and the parts of it that the assistant writes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from jaxbnb.convert import CheckpointError, Tokenizer
from jaxbnb.data._errors import DataError

Messages = Sequence[Mapping[str, Any]]


NO_PROMPT: Final = (
    "the chat template does not use add_generation_prompt, so what it writes before an "
    "answer is trained on, and prompts for the model end without it. Let it end with "
    "that if add_generation_prompt is true, or mark the assistant's text with "
    "{% generation %} and {% endgeneration %}"
)


class Chat(NamedTuple):
    """The text of a chat, with the spans of it that are trained on, in characters.

    ``notes`` say what may be wrong with it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


def render_whole(
    tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, Any]
) -> Chat:
    """Renders a chat with every character as a target; see `render_targets`."""
    text = _render(tokenizer, messages, variables, is_prompt=False).text
    return Chat(text, ((0, len(text)),))


def render_targets(
    tokenizer: Tokenizer,
    messages: Messages,
    first: int,
    variables: Mapping[str, Any],
) -> Chat:
    """Renders a chat and finds what the assistant writes in it.

    These are the template's ``{% generation %}`` blocks, if it has any. Otherwise a
    message of the assistant is what the template adds to the prompt for it, which is
    the chat before it with ``add_generation_prompt``. That presumes that the chat up to
    a message looks the same whatever follows. So each part is checked to be a prefix.

    Args:
        tokenizer: tokenizer with a chat template.
        messages: the whole chat.
        first: number of messages at the start that are context only.
        variables: other variables of the template.

    Raises:
        DataError: the template refuses the messages, or changes earlier messages when
            others follow, or the assistant speaks first.
    """
    whole = _render(tokenizer, messages, variables, is_prompt=False)

    def find_end(count: int, *, is_prompt: bool) -> int:
        """Returns where the text of the first ``count`` messages ends."""
        if count == 0:
            raise DataError(
                "the assistant speaks first, so no prompt comes before it. Begin with "
                "a message of the system or the user, or mark the assistant's text in "
                "the template with {% generation %} and {% endgeneration %}"
            )
        part = _render(tokenizer, messages[:count], variables, is_prompt=is_prompt).text
        if not whole.text.startswith(part):
            # Phi-3's template, for one, ends a whole chat with another token.
            shorter = part.removesuffix(tokenizer.special_tokens.get("eos_token", ""))
            if not whole.text.startswith(shorter):
                raise DataError(_not_a_prefix(part, whole.text, count, is_prompt))
            part = shorter
        return len(part)

    turns = [
        index
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "assistant"
    ]
    notes: tuple[str, ...] = ()
    if whole.spans is None or not turns:
        spans = [
            (find_end(index, is_prompt=True), find_end(index + 1, is_prompt=False))
            for index in turns
        ]
        # Only a template without a prompt leaves a header in the span: the others are
        # not rendered once more.
        if (
            turns
            and _has_header(whole.text[slice(*spans[0])], messages[turns[0]])
            and find_end(turns[0], is_prompt=False) == spans[0][0]
        ):
            notes = (NO_PROMPT,)
    else:
        start = find_end(first, is_prompt=True) if first else 0
        clipped = [(max(start, begin), end) for begin, end in whole.spans]
        spans = [(begin, end) for begin, end in clipped if begin < end]
    return Chat(whole.text, tuple(spans), notes)


def encode_start(
    tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, Any]
) -> list[int]:
    """Encodes messages as a prompt for the assistant's next one."""
    text = _render(tokenizer, messages, variables, is_prompt=True).text
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def _render(
    tokenizer: Tokenizer,
    messages: Messages,
    variables: Mapping[str, Any],
    *,
    is_prompt: bool,
) -> Any:
    options = {**variables, "add_generation_prompt": is_prompt}
    try:
        return tokenizer.render_chat(messages, **options)
    except CheckpointError:
        # The template is at fault, for every row.
        raise
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from error


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns messages as dicts.

    Raises:
        DataError: it is not a list of messages, each with a role.
    """
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{name} must be a list of messages, got {value!r:.100}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"each of the {name} must be a dict with a role and a content, got "
                f"{message!r:.100}"
            )
    return [dict(message) for message in value]


def parse_arguments(
    tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, Any]
) -> Messages:
    """Returns messages with the arguments of tool calls in the form that fits.

    OpenAI's format has them as a string of JSON. Most templates write objects as JSON,
    and would put the string in quotes. Some accept a string only, and refuse objects.
    """
    parsed = [_with_objects(message) for message in messages]
    if parsed == messages:
        return messages
    try:
        _render(tokenizer, parsed, variables, is_prompt=False)
    except DataError:
        return messages
    return parsed


def read_tools(value: Any) -> Any:
    """Returns a list of schemas, which may be given as a string of JSON.

    Tables of columns, such as Parquet, cannot hold schemas that differ.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"tools are a string, and not valid JSON: {error}") from error


def find_last_turn(messages: Messages) -> int:
    """Returns the index of the assistant's last message; their number if none."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return turns[-1] if turns else len(messages)


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    message, calls = dict(message), message.get("tool_calls")
    if isinstance(calls, list | tuple):
        message["tool_calls"] = [_with_object(call) for call in calls]
    return message


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    if not isinstance(parsed, dict):
        return call
    return {**call, "function": {**function, "arguments": parsed}}


def _has_header(text: str, message: Mapping[str, Any]) -> bool:
    """Whether the text of a message has more than space before its content."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return False
    return bool(text.partition(content.strip())[0].strip())


def _not_a_prefix(part: str, whole: str, count: int, is_prompt: bool) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b),
        min(len(part), len(whole)),
    )
    what = "the prompt for message" if is_prompt else "the chat up to message"
    number = count if is_prompt else count - 1
    alone, followed = (text[same : same + 40] for text in (part, whole))
    return (
        f"the chat template renders {what} {number} differently when the rest of the "
        f"chat follows: {alone!r} becomes {followed!r}. "
        "So it does not show what the assistant writes. Templates that leave out the "
        "reasoning of earlier turns, or open it in the prompt, do this. Train on the "
        "last turn only, with loss_on='last'; or switch reasoning off, often with the "
        "column chat_template_kwargs, {'enable_thinking': false}; or mark the "
        "assistant's text in the template with {% generation %} and {% endgeneration %}"
    )
