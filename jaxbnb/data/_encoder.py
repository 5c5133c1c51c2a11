"""Encoder: rows of data to tokens, and which of them are trained on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32

from jaxbnb.convert import Tokenizer
from jaxbnb.data._chat import (
    Messages,
    encode_start,
    find_last_turn,
    parse_arguments,
    read_messages,
    read_tools,
    render_targets,
    render_whole,
)
from jaxbnb.data._errors import DataError

LossOn = Literal["completion", "last", "all"]

NOT_A_PREFIX: Final = (
    "the last tokens of the prompt change when the completion follows, so a model that "
    "gets the prompt alone sees others. Move the space between them from the end of "
    "the prompt to the start of the completion"
)
NO_COMPLETION: Final = (
    "the completion is empty, so the model learns to end its answer at once. Leave out "
    "such rows if that is not meant"
)
# Words of a text that serve as a prompt.
_FIRST_WORDS: Final = 12
NO_STOP: Final = (
    "no token that ends a text is a target, so the model will not learn to stop. Check "
    "that the chat template ends a message of the assistant, inside its "
    "{% generation %} block if it has one, with one of the tokenizer's stop tokens"
)
# What to do with keys of other forms that are common.
_HINTS: Final = {
    "conversations": (
        ". Give the turns as messages: [{'role': 'user', 'content': ...}, ...]"
    ),
    "instruction": ". Rename output to completion, and make a prompt of the rest",
    "question": ". Rename question to prompt, and answer to completion",
}


class Example(NamedTuple):
    """The tokens of a row, and which of them are targets.

    Attributes:
        tokens: token ids.
        is_target: whether each token is a target. The first never is, because nothing
            predicts it.
        is_text: whether a window may begin anywhere in it, as in plain text.
        notes: what may be wrong with it.
    """

    tokens: Int32[np.ndarray, " tokens"]
    is_target: Bool[np.ndarray, " tokens"]
    is_text: bool = False
    notes: tuple[str, ...] = ()


class Prompt(NamedTuple):
    """What a model is given, to answer as a row does.

    Attributes:
        text: the prompt for people; of a chat, what the messages say.
        token_ids: the prompt for the model.
        is_chat: whether it is a chat.
    """

    text: str
    token_ids: list[int]
    is_chat: bool


class _Plan(NamedTuple):
    """What the tokenizer gets for a row, and what is a target.

    Attributes:
        text: the whole text.
        prompt: start of the text, which is not a target; None for no prompt.
        spans: targets, in characters; None where ``prompt`` decides.
        notes: see `Example`.
    """

    text: str
    prompt: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    is_text: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns rows into tokens, and marks those that the model is trained on.

    A row has one of these forms, the first that fits. Other columns are ignored.

    - ``messages``: a chat, with ``role`` and ``content`` as in OpenAI's format, with
      tool calls; optionally ``tools``, schemas as a list or as a string of JSON, and
      ``chat_template_kwargs``, other variables of the template. Targets are the
      assistant's messages with the token that ends them.
    - ``prompt`` and ``completion``: two strings, or two lists of messages. Targets are
      the completion and its end, and in messages those of the assistant.
    - ``text``: every token is a target.

    Text and completions in strings get the tokenizer's end token, unless they have it.
    What begins a text is up to the tokenizer.

    The assistant's messages are found by the template's ``{% generation %}`` blocks. A
    template without them must render the start of a chat the same whatever follows.

    Attributes:
        tokenizer: tokenizer of the model.
        loss_on: targets: "completion" as above, "last" for the assistant's last message
            only, "all" for every token of any row.
        vocab_size: number of the model's tokens, so that a row with a token beyond is
            refused; None for no check.

    Raises:
        ValueError: ``loss_on`` is not one of its values.

    Example:
        >>> import jaxbnb
        >>> from jaxbnb.data import Encoder
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = {"2": 0, "+": 1, "4": 2, "</s>": 3}
        >>> words = Tokenizer(models.WordLevel(words, "+"))
        >>> words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        >>> tokenizer = jaxbnb.convert.Tokenizer(words, (3,), None, {})
        >>> encoder = Encoder(tokenizer)
        >>> example = encoder.encode({"prompt": "2+2", "completion": "4"})
        >>> example.tokens.tolist(), example.is_target.tolist()
        ([0, 1, 0, 2, 3], [False, False, False, True, True])
    """

    tokenizer: Tokenizer
    loss_on: LossOn = "completion"
    vocab_size: int | None = None

    def __post_init__(self):
        if self.loss_on not in get_args(LossOn):
            raise ValueError(
                f"loss_on must be one of {get_args(LossOn)}, got {self.loss_on!r}"
            )

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Encodes a row.

        Raises:
            DataError: the row has none of the forms above, its template cannot show
                what the assistant writes, or it has a token beyond ``vocab_size``.
        """
        (example,) = self.encode_batch([row])
        if isinstance(example, DataError):
            raise example
        return example

    def encode_batch(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> list[Example | DataError]:
        """Encodes several rows, on all cores.

        Returns:
            The example of each row, or its error, which is not raised.
        """
        plans: list[_Plan | DataError] = []
        for row in rows:
            try:
                plans.append(self._plan(row))
            except DataError as error:
                plans.append(error)
        sound = [plan for plan in plans if isinstance(plan, _Plan)]
        encoded = map(self._check_vocabulary, self._finish(sound))
        return [
            plan if isinstance(plan, DataError) else next(encoded) for plan in plans
        ]

    def encode_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Encodes what comes before the answer in a row.

        In a chat, these are the messages before the assistant's last one. Text has no
        answer, so its first words are taken.

        Raises:
            DataError: see `encode`.

        Example:
            >>> import jaxbnb
            >>> from tokenizers import Tokenizer, models, pre_tokenizers
            >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
            >>> words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            >>> tokenizer = jaxbnb.convert.Tokenizer(words, (), None, {})
            >>> Encoder(tokenizer).encode_prompt({"prompt": "ab", "completion": "b"})
            Prompt(text='ab', token_ids=[0, 1], is_chat=False)
        """
        chat = _read_chat(row)
        if chat is None:
            text = self._plan(row).prompt
            if text is None:
                text = " ".join(row["text"].split()[:_FIRST_WORDS])
            return Prompt(text, self.tokenizer.encode(text), False)
        messages, first = chat
        variables = _read_variables(row)
        messages = parse_arguments(self.tokenizer, messages, variables)
        messages = messages[: max(first, find_last_turn(messages))]
        text = "\n".join(str(message.get("content") or "") for message in messages)
        token_ids = encode_start(self.tokenizer, messages, variables)
        return Prompt(text, token_ids, True)

    def _plan(self, row: Mapping[str, Any]) -> _Plan:
        chat = _read_chat(row)
        if chat is not None:
            return self._plan_chat(row, *chat)
        prompt, completion = row.get("prompt"), row.get("completion")
        if prompt is not None and completion is not None:
            _check_text(prompt, "prompt")
            _check_text(completion, "completion")
            notes = () if completion else (NO_COMPLETION,)
            return _Plan(prompt + completion, prompt=prompt, notes=notes)
        if row.get("text") is not None:
            _check_text(row["text"], "text")
            return _Plan(row["text"], is_text=True)
        keys = ", ".join(map(repr, row)) or "none"
        hints = (hint for key, hint in _HINTS.items() if key in row)
        raise DataError(
            "a row needs text, or prompt and completion, or messages; its keys are "
            f"{keys}{next(hints, '')}"
        )

    def _plan_chat(self, row: Mapping, messages: Messages, first: int) -> _Plan:
        variables = _read_variables(row)
        messages = parse_arguments(self.tokenizer, messages, variables)
        if self.loss_on == "all":
            chat = render_whole(self.tokenizer, messages, variables)
        else:
            if self.loss_on == "last":
                first = max(first, find_last_turn(messages))
            chat = render_targets(self.tokenizer, messages, first, variables)
        _check_text(chat.text, "messages")
        return _Plan(chat.text, spans=chat.spans, notes=chat.notes)

    def _finish(self, plans: Sequence[_Plan]) -> list[Example]:
        """Tokenises, with one call for all texts of a kind."""
        stops = self._find_stops()
        chats = [plan.text for plan in plans if plan.spans is not None]
        others = [plan.text for plan in plans if plan.spans is None]
        prompts = [plan.prompt for plan in plans if plan.prompt is not None]
        encode = self.tokenizer.encode_batch
        in_chats = iter(encode(chats, add_special_tokens=False))
        in_others, in_prompts = map(iter, (encode(others), encode(prompts)))
        examples = []
        for plan in plans:
            notes = plan.notes
            if plan.spans is not None:
                encoding = next(in_chats)
                tokens, is_target = encoding.ids, _overlap(encoding.offsets, plan.spans)
            else:
                tokens = _end(next(in_others).ids, stops)
                start = 0
                if plan.prompt is not None:
                    prompt = _strip_end(next(in_prompts))
                    start = _common_length(prompt, tokens)
                    if start < len(prompt):
                        notes = (*notes, NOT_A_PREFIX)
                is_target = np.arange(len(tokens)) >= start
            if self.loss_on == "all":
                is_target = np.ones(len(tokens), bool)
            is_target[:1] = False
            tokens = np.asarray(tokens, np.int32)
            targets = tokens[is_target].tolist()
            if targets and not set(targets).intersection(stops):
                notes = (*notes, NO_STOP)
            examples.append(Example(tokens, is_target, plan.is_text, notes))
        return examples

    def _check_vocabulary(self, example: Example) -> Example | DataError:
        """Returns the example, or an error for a token that the model does not have."""
        largest = int(example.tokens.max(initial=-1))
        if self.vocab_size is None or largest < self.vocab_size:
            return example
        token = self.tokenizer.tokenizer.id_to_token(largest)
        return DataError(
            f"token {largest}, {token!r}, is outside the model's vocabulary, 0 to "
            f"{self.vocab_size - 1}; give the model's own tokenizer, or add rows with "
            "jaxbnb.models.resize_token_embeddings"
        )

    def _find_stops(self) -> list[int]:
        """Returns the tokens that end a text, first the one to add."""
        end = self.tokenizer.special_tokens.get("eos_token")
        found = None if end is None else self.tokenizer.tokenizer.token_to_id(end)
        ids = self.tokenizer.stop_token_ids
        return [*ids] if found is None else [found, *ids]


def _read_chat(row: Mapping[str, Any]) -> tuple[Messages, int] | None:
    """Returns the messages of a row, and how many only prompt; None for strings."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a dict, got {row!r:.100}")
    if row.get("messages") is not None:
        return read_messages(row["messages"], "messages"), 0
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    are_strings = isinstance(prompt, str), isinstance(completion, str)
    if all(are_strings):
        return None
    if any(are_strings):
        raise DataError(
            "prompt and completion must both be strings, or both lists of messages"
        )
    before = read_messages(prompt, "prompt")
    return before + read_messages(completion, "completion"), len(before)


def _read_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of the chat template besides the messages."""
    tools = read_tools(row.get("tools"))
    variables = dict(row.get("chat_template_kwargs") or {})
    return {**variables, "tools": tools} if tools else variables


def _end(tokens: list[int], stops: Sequence[int]) -> list[int]:
    if not stops:
        raise DataError(
            "the tokenizer names no token that ends a text; name one: "
            "dataclasses.replace(tokenizer, special_tokens={'eos_token': ...})"
        )
    return tokens if tokens[-1:] == [stops[0]] else [*tokens, stops[0]]


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{name} must be a string, got {text!r:.100}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds half of a surrogate pair at character {error.start}, which "
            "is not a character"
        ) from error


def _overlap(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, " tokens"]:
    """Says which tokens lie in a span, if only with a part, as in transformers."""
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    is_inside = np.zeros(len(offsets), bool)
    for start, stop in spans:
        is_inside |= (begins < stop) & (ends > start)
    return is_inside


def _strip_end(encoding: Any) -> list[int]:
    """Returns the tokens of a prompt without those that the tokenizer ends it with."""
    ids, is_special = encoding.ids, encoding.special_tokens_mask
    count = len(ids)
    while count and is_special[count - 1]:
        count -= 1
    return ids[:count]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
