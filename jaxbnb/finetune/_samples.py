"""Prompts that a model answers before and after training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbnb.convert import Tokenizer
from jaxbnb.data import Dataset
from jaxbnb.models import CausalLM, generate

# Prompts that are taken from the data, and tokens of each answer.
_NUMBER, _NEW_TOKENS = 2, 48
# Words of a text, and tokens of any prompt.
_WORDS, _LONGEST = 12, 256


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: the prompt for people.
        token_ids: the prompt for the model.
    """

    text: str
    token_ids: list[int]


def choose_prompts(
    texts: Sequence[str] | None, dataset: Dataset, tokenizer: Tokenizer
) -> list[Prompt]:
    """Returns the prompts for a run.

    Args:
        texts: the prompts; None for the first rows of the dataset. If these are chats,
            a text is a user's message.
        dataset: rows that show what prompts look like.
        tokenizer: tokenizer of the model.
    """
    if texts is None:
        rows = (dataset[index] for index in range(min(_NUMBER, len(dataset))))
        found = [_read_prompt(row, tokenizer) for row in rows]
    elif is_chat(dataset):
        found = [
            Prompt(text, tokenizer.encode_chat([{"role": "user", "content": text}]))
            for text in texts
        ]
    else:
        found = [Prompt(text, tokenizer.encode(text)) for text in texts]
    return [prompt for prompt in found if 0 < len(prompt.token_ids) <= _LONGEST]


def is_chat(dataset: Dataset) -> bool:
    """Whether the first row is a chat, and so all are taken to be."""
    return isinstance(_read_start(dataset[0]), list)


def answer(
    model: CausalLM, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> list[str]:
    """Answers all prompts together, always with the likeliest token."""
    if not prompts:
        return []
    longest = max(len(prompt.token_ids) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.token_ids) :] = prompt.token_ids
        mask[row, longest - len(prompt.token_ids) :] = True
    stops = [t for t in tokenizer.stop_token_ids if t < model.config.vocab_size]
    new = generate(
        model,
        jnp.asarray(tokens),
        _NEW_TOKENS,
        attention_mask=jnp.asarray(mask),
        eos_token_id=stops or None,
    )
    rows = np.asarray(new).tolist()
    return [_decode(row, stops, tokenizer) for row in rows]


def _decode(tokens: list[int], stops: Sequence[int], tokenizer: Tokenizer) -> str:
    ends = [tokens.index(stop) for stop in stops if stop in tokens]
    text = tokenizer.decode(tokens[: min(ends, default=len(tokens))])
    return text if ends else f"{text}…"


def _read_start(row: Mapping[str, Any]) -> Any:
    """Returns what an answer to a row follows: text, or messages."""
    messages = row.get("messages")
    if isinstance(messages, list):
        roles = [message.get("role") for message in messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        return messages[:last]
    if "prompt" in row:
        return row["prompt"]
    return " ".join(str(row.get("text", "")).split()[:_WORDS])


def _read_prompt(row: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    start = _read_start(row)
    if isinstance(start, str):
        return Prompt(start, tokenizer.encode(start))
    variables = {"tools": row["tools"]} if isinstance(row.get("tools"), list) else {}
    text = "\n".join(str(message.get("content")) for message in start)
    return Prompt(text, tokenizer.encode_chat(start, **variables) if start else [])
