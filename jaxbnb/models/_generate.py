"""generate: a prompt's continuation, token by token, in one compiled function."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int, Int32

from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._causal_lm import CausalLM


def generate(
    model: CausalLM,
    token_ids: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Bool[Array, "batch seq"]
    | Bool[np.ndarray, "batch seq"]
    | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> Int32[Array, "batch max_new_tokens"]:
    """Continues each prompt, stopping early once all rows have ended.

    Compiled once for each shape of ``token_ids``, ``max_new_tokens``, ``top_k`` and
    model structure; new weights, prompts, keys and temperatures compile nothing. Where
    lengths vary, pad prompts on the left to a few lengths.

    Args:
        model: a `CausalLM`, its linear layers quantised or not.
        token_ids: the prompts, padded on the left where they differ in length.
        max_new_tokens: tokens to make.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens.
        top_p: sample among the fewest tokens, likeliest first, that together have at
            least this probability (after ``top_k``).
        key: for sampling, from ``jax.random.key``; without use at temperature 0.
        eos_token_id: a token, or several, that ends a row.
        pad_token_id: what follows it; None for the first of ``eos_token_id``.
        attention_mask: False for padding; None for none.
        cache_dtype: dtype of the `KVCache`; None for that of the computation.

    Returns:
        The new tokens, the one that ends a row among them, without the prompts.

    Raises:
        ValueError: an argument is out of range, ``key`` is missing, prompts are padded
            on the right, or prompt and continuation exceed the positions of the model.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig, generate
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> prompts = jnp.array([[1, 2, 3], [4, 5, 6]])
        >>> generate(model, prompts, 8).shape
        (2, 8)
        >>> generate(model, prompts, 8, temperature=0.7, key=jax.random.key(0)).shape
        (2, 8)

    References:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top_p).
    """
    token_ids = jnp.asarray(token_ids, jnp.int32)
    if token_ids.ndim != 2 or 0 in token_ids.shape:
        raise ValueError(
            f"token_ids must be (batch, seq), neither of them 0; got {token_ids.shape}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_length(model.config, token_ids.shape[1] + max_new_tokens)
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, token_ids.shape)
    _check_sampling(model.config.vocab_size, temperature, top_k, top_p, key)
    eos = _token_tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    plan = _Plan(
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        eos=eos,
        pad=pad_token_id,
        cache_dtype=jnp.dtype(
            model.model.dtype if cache_dtype is None else cache_dtype
        ),
    )
    choice = None
    if temperature > 0:
        nucleus = None if top_p is None else np.float32(top_p)
        choice = _Choice(key, np.float32(temperature), nucleus)
    graphdef, state = nnx.split(model)
    return _generate(graphdef, plan, state, token_ids, attention_mask, choice)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is compiled in."""

    max_new_tokens: int
    top_k: int | None
    eos: tuple[int, ...]
    pad: int
    cache_dtype: np.dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "temperature", "top_p"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class _Choice:
    """How to sample; None in its place for the likeliest token."""

    key: Any
    temperature: Any
    top_p: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    graphdef: nnx.GraphDef,
    plan: _Plan,
    state: nnx.State,
    token_ids: Int32[Array, "batch seq"],
    attention_mask: Bool[Array, "batch seq"] | None,
    choice: _Choice | None,
) -> Int32[Array, "batch max_new_tokens"]:
    model: CausalLM = nnx.merge(graphdef, state)
    batch, seq = token_ids.shape
    steps = plan.max_new_tokens

    def read(token_ids, cache, attention_mask=None):
        """The logits of what follows the last of some tokens."""
        hidden, cache = model.model(
            token_ids, attention_mask=attention_mask, cache=cache
        )
        return model.logits(hidden[:, -1]), cache

    def choose(step, logits, ended, out):
        tokens = _choose(logits, step, choice, plan.top_k)
        tokens = jnp.where(ended, plan.pad, tokens)
        for eos in plan.eos:
            ended = ended | (tokens == eos)
        out = jax.lax.dynamic_update_slice(out, tokens[:, None], (0, step))
        return tokens, ended, out

    def is_unfinished(loop):
        step, _, ended, _, _ = loop
        return (step < steps) & ~jnp.all(ended)

    def body(loop):
        step, tokens, ended, out, cache = loop
        logits, cache = read(tokens[:, None], cache)
        return step + 1, *choose(step, logits, ended, out), cache

    # The last token is returned and never read.
    cache = KVCache.empty(model.config, batch, seq + steps - 1, plan.cache_dtype)
    logits, cache = read(token_ids, cache, attention_mask)
    out = jnp.full((batch, steps), plan.pad, jnp.int32)
    first = choose(jnp.int32(0), logits, jnp.zeros(batch, jnp.bool_), out)
    loop = jax.lax.while_loop(is_unfinished, body, (jnp.int32(1), *first, cache))
    return loop[3]


def _choose(
    logits: Float32[Array, "batch vocab"],
    step: Int32[Array, ""],
    choice: _Choice | None,
    top_k: int | None,
) -> Int32[Array, " batch"]:
    if choice is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(choice.key, step)
    logits = logits / choice.temperature
    if top_k is None and choice.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, top_k or logits.shape[-1])
    if choice.top_p is not None:
        p = jax.nn.softmax(logits)
        logits = jnp.where(jnp.cumsum(p, axis=-1) - p < choice.top_p, logits, -jnp.inf)
    rank = jax.random.categorical(key, logits)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0]


def _check_sampling(
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(
            f"top_k must be from 1 to the vocabulary's {vocab_size}, got {top_k}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            "top_k and top_p choose what to sample among, and temperature 0 does not "
            "sample; give a temperature above 0, or neither"
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"temperature {temperature} samples, which needs key=jax.random.key(seed); "
            "temperature=0 takes the likeliest token"
        )


def _check_mask(mask: Any, shape: tuple[int, ...]) -> Bool[Array, "batch seq"]:
    mask = np.asarray(mask).astype(bool)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must be of the shape of token_ids, {shape}; "
            f"got {mask.shape}"
        )
    if not mask[:, -1].all():
        raise ValueError(
            "the continuation follows the last column, which is padding in rows "
            f"{np.flatnonzero(~mask[:, -1]).tolist()}; pad on the left"
        )
    return jnp.asarray(mask)


def _token_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        return ()
    if isinstance(tokens, Sequence):
        return tuple(int(token) for token in tokens)
    return (int(tokens),)
