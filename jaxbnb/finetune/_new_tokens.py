"""New tokens: their ids, their rows in a model, and that a run trains these."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxbnb.convert import Tokenizer
from jaxbnb.finetune._config import TrainConfig
from jaxbnb.lora import LoraConfig, add_adapter, load_adapter
from jaxbnb.models import CausalLM, resize_token_embeddings

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"


def find_ids(config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of the new tokens."""
    ids = map(tokenizer.tokenizer.token_to_id, config.new_tokens or ())
    return tuple(token for token in ids if token is not None)


def make_room(model: CausalLM, ids: Sequence[int]) -> None:
    """Adds the rows that the new tokens need. Some vocabularies have room for them."""
    size = max(ids, default=-1) + 1
    if size > model.config.vocab_size:
        resize_token_embeddings(model, size)


def add_adapters(model: CausalLM, config: TrainConfig, ids: Sequence[int]) -> None:
    """Adds the adapters of a run, which also train the rows of new tokens.

    Raises:
        ValueError: they do not fit the model, or a saved adapter cannot be read.
    """
    if config.adapter is not None:
        load_adapter(model, config.adapter)
        return
    adapters = _train_rows(config.lora_config(), model, ids)
    add_adapter(model, adapters, rngs=nnx.Rngs(config.seed))


def _train_rows(config: LoraConfig, model: CausalLM, ids: Sequence[int]) -> LoraConfig:
    """Returns a config that also trains the rows of tokens, in embedding and head.

    Modules that are trained in full have these rows already.
    """
    if not ids:
        return config
    others: Any = config.trainable_token_indices or ()
    rows = {_EMBEDDING: (*others, *ids), _HEAD: tuple(ids)}
    rows = {name: each for name, each in rows.items() if not config.saves(name)}
    is_tied = model.lm_head is None
    indices: Any = rows or None
    if is_tied and len(rows) == 2:
        # The head follows the embedding.
        indices = rows[_EMBEDDING]
    return dataclasses.replace(config, trainable_token_indices=indices)
