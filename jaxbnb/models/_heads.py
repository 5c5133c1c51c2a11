"""Embeddings, and output heads: a linear layer of its own, or the embedding."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.core import QuantizedArray, matmul
from jaxbnb.lora import LoraEmbed, TrainedModule
from jaxbnb.sharding.activations import constrain, divides_batch, look_up
from jaxbnb_kernels.matmul_dense import matmul_dense


def make_head(
    hidden_size: int,
    vocab_size: int,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = False,
) -> nnx.Linear:
    """Makes a head that gives logits in float32."""
    return nnx.Linear(
        hidden_size,
        vocab_size,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def embed_tokens(
    embed: Any, token_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq hidden"]:
    """Embeds tokens; if devices share the embedding, they send its rows."""
    if divides_batch(token_ids) and type(embed) is nnx.Embed:
        found = look_up(embed.embedding[...], token_ids)
        if found is not None:
            return found.astype(embed.dtype)
    return embed(token_ids)


def apply_head(
    head: Any, embed: Any, hidden: Float[Array, "*batch hidden"], vocab_size: int
) -> Float32[Array, "*batch vocab"]:
    """Applies the head, or the embedding if the head is None."""
    rows = [None] * (hidden.ndim - 2)
    # Fewer numbers to send than a head is, so devices share it.
    if vocab_size <= math.prod(hidden.shape[:-1]):
        return _apply_head(head, embed, hidden)
    logits = _apply_head(head, embed, constrain(hidden, "group", *rows, None))
    return constrain(logits, "group", *rows, "spread_vocab")


def _apply_head(
    head: Any, embed: Any, hidden: Float[Array, "*batch hidden"]
) -> Float32[Array, "*batch vocab"]:
    if head is not None:
        return head(hidden).astype(jnp.float32)
    if isinstance(embed, LoraEmbed | TrainedModule):
        return embed.as_head(hidden, functools.partial(_attend, hidden))
    return _attend(hidden, embed)


def copy_embedding(embed: Any, dtype: jax.typing.DTypeLike) -> nnx.Linear:
    """Makes a head from the embedding that has been the head so far.

    Raises:
        ValueError: an adapter trains the embedding as the head, too.
    """
    if isinstance(embed, LoraEmbed | TrainedModule):
        if embed.is_head:
            raise ValueError(
                "an adapter of the embedding trains the head, too; untie the head "
                "before adding it"
            )
        embed = embed.base
    embedding = embed.embedding.get_value()
    if isinstance(embedding, QuantizedArray):
        embedding = embedding.dequantize()
    vocab_size, hidden_size = embedding.shape
    head = nnx.eval_shape(
        lambda: make_head(hidden_size, vocab_size, dtype, embedding.dtype, nnx.Rngs(0))
    )
    head.kernel = nnx.Param(embedding.T)
    return head


def _attend(
    hidden: Float[Array, "*batch hidden"], embed: Any
) -> Float32[Array, "*batch vocab"]:
    """Multiplies hidden states by the rows of an embedding."""
    # nnx.Embed.attend would round the logits to the dtype of the computation.
    embedding = embed.embedding[...]
    if isinstance(embedding, QuantizedArray):
        logits = hidden.astype(jnp.float32)
        return matmul(logits, embedding.mT, compute_dtype=hidden.dtype)
    return matmul_dense(
        hidden.astype(jnp.float32), embedding.astype(hidden.dtype), transpose=True
    )
