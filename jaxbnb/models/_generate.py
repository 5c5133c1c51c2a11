"""generate and generate_stream: a prompt's continuation, token by token."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Int32

from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._sampling import Sampling, choose, make_sampling

if TYPE_CHECKING:
    # It calls these functions.
    from jaxbnb.models._causal_lm import CausalLM


def generate(
    model: "CausalLM",
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

    One compiled function, for each shape of ``token_ids``, ``max_new_tokens``,
    ``top_k`` and model structure; new weights, prompts, keys and temperatures compile
    nothing. Where lengths vary, pad prompts on the left to a few lengths.

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
        cache_dtype: dtype of the `KVCache`: a floating one or int8; None for that of
            the computation.

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
    plan = _make_plan(model, max_new_tokens, eos_token_id, pad_token_id, cache_dtype)
    prompt = _check_prompt(model, token_ids, attention_mask, max_new_tokens)
    sampling = make_sampling(model.config.vocab_size, temperature, top_k, top_p, key)
    graphdef, state = nnx.split(model)
    return _generate(graphdef, plan, state, prompt, sampling)


def generate_stream(
    model: "CausalLM",
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
) -> Iterator[Int32[np.ndarray, " batch"]]:
    """The columns of what `generate` returns, each as soon as it is known.

    The device is at work on the next token while the caller has this one, so that
    reading them costs little beside `generate`.

    Args:
        model: and all others, as for `generate`.
        token_ids: the prompts.
        max_new_tokens: tokens to make, at most.
        temperature: divides the logits before sampling.
        top_k: sample among the so many likeliest tokens.
        top_p: sample among the fewest tokens that together are so likely.
        key: for sampling.
        eos_token_id: a token, or several, that ends a row.
        pad_token_id: what follows it.
        attention_mask: False for padding.
        cache_dtype: dtype of the `KVCache`.

    Returns:
        An iterator over the next token of each row, which ends once all rows have.

    Raises:
        ValueError: as `generate` does, and before anything runs.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig, generate_stream
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> prompt = jnp.array([[1, 2, 3]])
        >>> [tokens.shape for tokens in generate_stream(model, prompt, 2)]
        [(1,), (1,)]
    """
    plan = _make_plan(model, max_new_tokens, eos_token_id, pad_token_id, cache_dtype)
    prompt = _check_prompt(model, token_ids, attention_mask, max_new_tokens)
    sampling = make_sampling(model.config.vocab_size, temperature, top_k, top_p, key)
    graphdef, state = nnx.split(model)
    return _stream(graphdef, plan, state, prompt, sampling)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is compiled in."""

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    cache_dtype: np.dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_ids", "attention_mask"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Prompt:
    token_ids: Int32[Array, "batch seq"]
    attention_mask: Bool[Array, "batch seq"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "tokens", "ended"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Progress:
    """After ``step`` new tokens: the last of each row, and which rows have ended."""

    step: Int32[Array, ""]
    tokens: Int32[Array, " batch"]
    ended: Bool[Array, " batch"]


def _start(
    model: "CausalLM", plan: _Plan, prompt: _Prompt, sampling: Sampling | None
) -> tuple[_Progress, KVCache]:
    """Reads the prompt."""
    batch, seq = prompt.token_ids.shape
    # The last token is returned and never read.
    cache = KVCache.empty(
        model.config, batch, seq + plan.max_new_tokens - 1, plan.cache_dtype
    )
    none = jnp.zeros(batch, jnp.bool_)
    return _read(model, plan, prompt, jnp.int32(0), none, cache, sampling)


def _advance(
    model: "CausalLM",
    plan: _Plan,
    progress: _Progress,
    cache: KVCache,
    sampling: Sampling | None,
) -> tuple[_Progress, KVCache]:
    """Reads the last token."""
    last = _Prompt(progress.tokens[:, None], None)
    return _read(model, plan, last, progress.step, progress.ended, cache, sampling)


def _read(
    model: "CausalLM",
    plan: _Plan,
    new: _Prompt,
    step: Int32[Array, ""],
    ended: Bool[Array, " batch"],
    cache: KVCache,
    sampling: Sampling | None,
) -> tuple[_Progress, KVCache]:
    hidden, cache = model.model(
        new.token_ids, attention_mask=new.attention_mask, cache=cache
    )
    tokens = choose(model.logits(hidden[:, -1]), step, sampling)
    tokens = jnp.where(ended, plan.pad, tokens)
    for eos in plan.eos:
        ended = ended | (tokens == eos)
    return _Progress(step + 1, tokens, ended), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    graphdef: nnx.GraphDef,
    plan: _Plan,
    state: nnx.State,
    prompt: _Prompt,
    sampling: Sampling | None,
) -> Int32[Array, "batch max_new_tokens"]:
    model: CausalLM = nnx.merge(graphdef, state)
    steps = plan.max_new_tokens

    def put(out, progress):
        column = progress.tokens[:, None]
        return jax.lax.dynamic_update_slice(out, column, (0, progress.step - 1))

    def is_unfinished(loop):
        progress, _, _ = loop
        return (progress.step < steps) & ~jnp.all(progress.ended)

    def body(loop):
        progress, cache, out = loop
        progress, cache = _advance(model, plan, progress, cache, sampling)
        return progress, cache, put(out, progress)

    progress, cache = _start(model, plan, prompt, sampling)
    out = jnp.full((prompt.token_ids.shape[0], steps), plan.pad, jnp.int32)
    loop = (progress, cache, put(out, progress))
    return jax.lax.while_loop(is_unfinished, body, loop)[-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start_stream(graphdef, plan, state, prompt, sampling):
    return _start(nnx.merge(graphdef, state), plan, prompt, sampling)


# The cache is updated in place.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _advance_stream(graphdef, plan, state, progress, cache, sampling):
    return _advance(nnx.merge(graphdef, state), plan, progress, cache, sampling)


def _stream(
    graphdef: nnx.GraphDef,
    plan: _Plan,
    state: nnx.State,
    prompt: _Prompt,
    sampling: Sampling | None,
) -> Iterator[Int32[np.ndarray, " batch"]]:
    progress, cache = _start_stream(graphdef, plan, state, prompt, sampling)
    for left in reversed(range(plan.max_new_tokens)):
        known = progress
        if left:
            progress, cache = _advance_stream(
                graphdef, plan, state, progress, cache, sampling
            )
        yield np.asarray(known.tokens)
        if np.asarray(known.ended).all():
            return


def _make_plan(
    model: "CausalLM",
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    cache_dtype: jax.typing.DTypeLike | None,
) -> _Plan:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    eos = _token_tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    if cache_dtype is None:
        cache_dtype = model.model.dtype
    return _Plan(max_new_tokens, eos, pad_token_id, jnp.dtype(cache_dtype))


def _check_prompt(
    model: "CausalLM", token_ids: Any, attention_mask: Any, max_new_tokens: int
) -> _Prompt:
    token_ids = jnp.asarray(token_ids, jnp.int32)
    if token_ids.ndim != 2 or 0 in token_ids.shape:
        raise ValueError(
            f"token_ids must be (batch, seq), neither of them 0; got {token_ids.shape}"
        )
    check_length(model.config, token_ids.shape[1] + max_new_tokens)
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, token_ids.shape)
    return _Prompt(token_ids, attention_mask)


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
