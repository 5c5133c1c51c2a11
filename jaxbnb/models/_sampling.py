"""Chooses the next token: the likeliest one, or a draw from those that are allowed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "temperature", "top_p"),
    meta_fields=("top_k",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How to draw tokens. Functions take None instead to choose the likeliest token.

    Only ``top_k`` is compiled in.

    Attributes:
        key: random key, from ``jax.random.key``.
        temperature: divisor of the logits, above 0.
        top_p: probability of the tokens to draw from, in (0, 1]; None for all tokens.
        top_k: number of tokens to draw from; None for all.
    """

    key: jax.Array
    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""] | None
    top_k: int | None


def make_sampling(
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> Sampling | None:
    """Builds a `Sampling` from the arguments of `generate`, checking them.

    Raises:
        ValueError: an argument is out of range, or ``key`` is missing.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(
            f"top_k must be from 1 to the vocabulary's {vocab_size}, got {top_k}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise ValueError(
                "top_k and top_p choose what to sample among, and temperature 0 does "
                "not sample; give a temperature above 0, or neither"
            )
        return None
    if key is None:
        raise ValueError(
            f"temperature {temperature} samples, which needs key=jax.random.key(seed); "
            "temperature=0 takes the likeliest token"
        )
    nucleus = None if top_p is None else jnp.float32(top_p)
    return Sampling(key, jnp.float32(temperature), nucleus, top_k)


def choose(
    logits: Float32[Array, "batch vocab"],
    step: Int32[Array, ""],
    sampling: Sampling | None,
) -> Int32[Array, " batch"]:
    """Chooses the next token of each row. Every ``step`` draws fresh random numbers."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(sampling.key, step)
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, sampling.top_k or logits.shape[-1])
    if sampling.top_p is not None:
        p = jax.nn.softmax(logits)
        is_allowed = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        logits = jnp.where(is_allowed, logits, -np.inf)
    rank = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0]
