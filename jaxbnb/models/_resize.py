"""resize_token_embeddings: adds rows to the embedding and the output head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.core.parts import apply_or_eval_shape
from jaxbnb.lora.file_names import RESIZED
from jaxbnb.models._causal_lm import CausalLM


def resize_token_embeddings(model: CausalLM, new_num_tokens: int) -> None:
    """Adds tokens to the vocabulary of a model, in place.

    New rows of the embedding and the head are the mean of the old ones, in float32,
    rounded to their dtype. (transformers adds noise with 3e-5 of their deviation.) Do
    this before adding adapters; ``trainable_token_indices`` or ``modules_to_save`` of
    `jaxbnb.lora.LoraConfig` then trains the rows. `jaxbnb.lora.save_adapter` saves the
    resized embedding and head with the adapter, like PEFT, and `save_pretrained` saves
    the new size. The tokenizer must get its new tokens separately.

    Args:
        model: model with ``vocab_size`` rows.
        new_num_tokens: number of rows to have, at least ``vocab_size``.

    Raises:
        TypeError: ``model`` is not a `CausalLM`, or the number is not an int.
        ValueError: the number is less than the model has; or the embedding or the head
            has adapters.
        NotImplementedError: the embedding or the head is quantised.

    Example:
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig, resize_token_embeddings
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> resize_token_embeddings(model, 260)
        >>> model.config.vocab_size, model.lm_head.kernel.shape
        (260, (64, 260))

    References:
        ``resize_token_embeddings`` of transformers.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model must be a CausalLM; got {type(model).__name__}")
    if type(new_num_tokens) is not int:
        raise TypeError(f"new_num_tokens must be an int; got {new_num_tokens!r}")
    old = model.config.vocab_size
    if new_num_tokens < old:
        raise ValueError(
            f"new_num_tokens must be at least {old}, the model's vocab_size; got "
            f"{new_num_tokens}"
        )
    embed, head = model.model.embed_tokens, model.lm_head
    _check_plain("embed_tokens", embed, nnx.Embed)
    if head is not None:
        _check_plain("lm_head", head, nnx.Linear)
    if new_num_tokens == old:
        return
    embed.embedding = _add_rows(embed.embedding, new_num_tokens, 0)
    embed.num_embeddings = new_num_tokens
    if head is not None:
        head.kernel = _add_rows(head.kernel, new_num_tokens, 1)
        if head.bias is not None:
            head.bias = _add_rows(head.bias, new_num_tokens, 0)
        head.out_features = new_num_tokens
    for module in (model, model.model):
        module.config = dataclasses.replace(module.config, vocab_size=new_num_tokens)


def is_resized(model: CausalLM) -> bool:
    """Whether `resize_token_embeddings` has added rows to a model."""
    metadata = model.model.embed_tokens.embedding.get_metadata()
    return metadata.get(RESIZED) is not None


def _check_plain(name: str, module: Any, plain: type) -> None:
    if type(module) is plain:
        return
    if hasattr(module, "adapters"):
        raise ValueError(f"{name} has adapters; resize the model before adding them")
    raise NotImplementedError(
        f"{name} is a {type(module).__name__}, which cannot get rows; resize the model "
        "before quantising it, or decode it with jaxbnb.nnx.dequantize_model"
    )


def _add_rows(param: Any, size: int, axis: int) -> nnx.Param[Any]:
    """Returns a table with rows of the mean added, marked as resized."""

    def add(table: Float[Array, "..."]) -> Float[Array, "..."]:
        mean = jnp.mean(table.astype(jnp.float32), axis, keepdims=True)
        count = size - table.shape[axis]
        rows = jnp.repeat(mean.astype(table.dtype), count, axis)
        return jnp.concatenate([table, rows], axis)

    new = apply_or_eval_shape(add, param.get_value())
    return param.replace(new, **{RESIZED: True})
