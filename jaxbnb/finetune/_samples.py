"""Prompts that a model answers before and after training."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbnb.convert import Tokenizer
from jaxbnb.data import DataError, Dataset, Encoder, Prompt
from jaxbnb.models import CausalLM, generate

# Prompts that are taken from the data, of its first rows, and tokens of each answer.
_NUMBER, _ROWS, _NEW_TOKENS = 2, 100, 48
# Tokens of the longest prompt.
_LONGEST = 256


def choose_prompts(
    texts: Sequence[str] | None, dataset: Dataset, encoder: Encoder
) -> list[Prompt]:
    """Returns the prompts for a run.

    Args:
        texts: the prompts; None for those of the dataset's first rows. If these are
            chats, a text is a user's message.
        dataset: rows that show what prompts look like.
        encoder: encoder of the rows.
    """
    if texts is None:
        found = list(_read_prompts(dataset, encoder))
        return [p for p in found if 0 < len(p.token_ids) <= _LONGEST][:_NUMBER]
    tokenizer = encoder.tokenizer
    if not is_chat(dataset, encoder):
        return [Prompt(text, tokenizer.encode(text), False) for text in texts]
    return [
        Prompt(text, tokenizer.encode_chat([{"role": "user", "content": text}]), True)
        for text in texts
    ]


def is_chat(dataset: Dataset, encoder: Encoder) -> bool:
    """Whether the first sound row is a chat, and so all are taken to be."""
    return next((p.is_chat for p in _read_prompts(dataset, encoder)), False)


def _read_prompts(dataset: Dataset, encoder: Encoder) -> Iterator[Prompt]:
    """Yields the prompts of the first rows, without those that cannot be encoded."""
    for index in range(min(_ROWS, len(dataset))):
        try:
            yield encoder.encode_prompt(dataset[index])
        except DataError:
            continue


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
