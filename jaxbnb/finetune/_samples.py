"""Prompts that a model answers before and after training."""

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbnb.convert import Tokenizer
from jaxbnb.data import DataError, Dataset, Encoder, Prompt
from jaxbnb.finetune._config import ConfigError
from jaxbnb.models import CausalLM, generate

# Prompts that are taken from the data, of its first rows, and tokens of each answer.
_NUMBER, _ROWS, _NEW_TOKENS = 2, 100, 48
# Tokens of the longest prompt.
_LONGEST = 256


def choose_prompts(
    texts: Sequence[str] | None,
    dataset: Dataset,
    encoder: Encoder,
    max_length: int | None = None,
) -> list[Prompt]:
    """Returns the prompts for a run.

    Args:
        texts: the prompts; None for those of the dataset's first rows. If these are
            chats, a text is a user's message.
        dataset: rows that show what prompts look like.
        encoder: encoder of the rows.
        max_length: largest number of tokens of a prompt and its answer; None for any.

    Raises:
        ConfigError: one of ``texts`` is empty, or too long for the model.
    """
    longest = math.inf if max_length is None else max_length - _NEW_TOKENS
    if texts is None:
        longest = min(longest, _LONGEST)
        found = list(_read_prompts(dataset, encoder))
        return [p for p in found if 0 < len(p.token_ids) <= longest][:_NUMBER]
    tokenizer, are_chats = encoder.tokenizer, is_chat(dataset, encoder)
    prompts = []
    for text in texts:
        if are_chats:
            token_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        else:
            token_ids = tokenizer.encode(text)
        if not 0 < len(token_ids) <= longest:
            raise ConfigError(
                f"prompts: {text!r:.60} has {len(token_ids)} tokens; the model takes 1 "
                f"to {longest}, besides {_NEW_TOKENS} of an answer"
            )
        prompts.append(Prompt(text, token_ids, are_chats))
    return prompts


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
