"""generate and generate_stream: a prompt's continuation, token by token."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._rope import turning_length
from jaxbnb.models._sampling import Sampling, choose, make_sampling
from jaxbnb.models.tokens import as_int32, check_vocabulary, token_array

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

    A model with rope of type "longrope" uses other frequencies for long texts. When a
    row reaches that length, all texts so far are read again, once, as if they were the
    prompts.

    Args:
        model: a `CausalLM`, its linear layers quantised or not.
        token_ids: the prompts, padded on the left where they differ in length.
        max_new_tokens: tokens to make.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens.
        top_p: sample among the fewest tokens, likeliest first, that together have at
            least this probability (after ``top_k``).
        key: for sampling, from ``jax.random.key``; without use at temperature 0.
        eos_token_id: token, or several, that ends a row, e.g. ``stop_token_ids`` of
            `jaxbnb.convert.load_tokenizer`; None or an empty list to go on.
        pad_token_id: what follows it; None for the first of ``eos_token_id``.
        attention_mask: False for padding; None for none.
        cache_dtype: dtype of the `KVCache`: a floating one or int8; None for that of
            the computation.

    Returns:
        The new tokens, the one that ends a row among them, without the prompts.

    Raises:
        ValueError: an argument is out of range, ``key`` is missing, a token, padding
            too, is outside the vocabulary, prompts differ in length or are padded on
            the right, or prompt and continuation exceed the positions of the model.
        TypeError: ``token_ids`` do not hold integers, or ``eos_token_id`` or
            ``pad_token_id`` is not made of ints.

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
    prompt = _check_prompt(model, token_ids, attention_mask, max_new_tokens)
    plan = _make_plan(
        model, prompt, max_new_tokens, eos_token_id, pad_token_id, cache_dtype
    )
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
        TypeError: likewise.

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
    prompt = _check_prompt(model, token_ids, attention_mask, max_new_tokens)
    plan = _make_plan(
        model, prompt, max_new_tokens, eos_token_id, pad_token_id, cache_dtype
    )
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
    # The length beyond which frequencies change; None if they do not in this run.
    turn: int | None


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
    data_fields=("step", "tokens", "ended", "out"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Progress:
    """State after ``step`` new tokens: each row's last, which rows have ended, and all.

    In ``out``, padding follows the new tokens.
    """

    step: Int32[Array, ""]
    tokens: Int32[Array, " batch"]
    ended: Bool[Array, " batch"]
    out: Int32[Array, "batch max_new_tokens"]


def _start(
    model: "CausalLM", plan: _Plan, prompt: _Prompt, sampling: Sampling | None
) -> tuple[_Progress, KVCache]:
    """Reads the prompt."""
    batch, seq = prompt.token_ids.shape
    # The last token is returned and never read.
    cache = KVCache.empty(
        model.config, batch, seq + plan.max_new_tokens - 1, plan.cache_dtype
    )
    nothing = _Progress(
        step=jnp.int32(0),
        tokens=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, jnp.bool_),
        out=jnp.full((batch, plan.max_new_tokens), plan.pad, jnp.int32),
    )
    hidden, cache = model.model(
        prompt.token_ids, attention_mask=prompt.attention_mask, cache=cache
    )
    return _choose(model, plan, hidden[:, -1], nothing, sampling), cache


def _advance(
    model: "CausalLM",
    plan: _Plan,
    prompt: _Prompt,
    progress: _Progress,
    cache: KVCache,
    sampling: Sampling | None,
) -> tuple[_Progress, KVCache]:
    """Reads the last token, or the whole text again where frequencies change."""

    def read(cache):
        hidden, cache = model.model(progress.tokens[:, None], cache=cache)
        return hidden[:, -1], cache

    def read_again(cache):
        return _read_again(model, plan, prompt, progress, cache)

    if plan.turn is None:
        hidden, cache = read(cache)
    else:
        # XLA updates the cache in place on either branch.
        is_turn = cache.longest == plan.turn
        hidden, cache = jax.lax.cond(is_turn, read_again, read, cache)
    return _choose(model, plan, hidden, progress, sampling), cache


def _read_again(
    model: "CausalLM", plan: _Plan, prompt: _Prompt, progress: _Progress, cache: KVCache
) -> tuple[Float[Array, "batch hidden"], KVCache]:
    """Reads all tokens so far, because the model now has other frequencies for them.

    transformers does so for Phi-3. Otherwise keys in the cache would have the old
    frequencies, and the continuation would differ from that of the same text as a
    prompt.
    """
    assert plan.turn is not None
    seq, last = prompt.token_ids.shape[1], cache.length
    # Only padding makes a text wider than its longest row.
    padding = 0 if prompt.attention_mask is None else seq - 1
    width = min(cache.max_length, plan.turn + 1 + padding)
    text = jnp.concatenate([prompt.token_ids, progress.out], axis=1)[:, :width]
    slots = jnp.arange(width)
    hidden, again = model.model(
        text,
        attention_mask=cache.mask[:, :width] | (slots == last),
        cache=jax.tree.map(jnp.zeros_like, cache),
    )
    hidden = jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)
    return hidden, again.cut(last + 1)


def _choose(
    model: "CausalLM",
    plan: _Plan,
    hidden: Float[Array, "batch hidden"],
    progress: _Progress,
    sampling: Sampling | None,
) -> _Progress:
    """Chooses the token that follows each row."""
    step, ended = progress.step, progress.ended
    tokens = choose(model.logits(hidden), step, sampling)
    tokens = jnp.where(ended, plan.pad, tokens)
    for eos in plan.eos:
        ended = ended | (tokens == eos)
    out = jax.lax.dynamic_update_slice(progress.out, tokens[:, None], (0, step))
    return _Progress(step + 1, tokens, ended, out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    graphdef: nnx.GraphDef,
    plan: _Plan,
    state: nnx.State,
    prompt: _Prompt,
    sampling: Sampling | None,
) -> Int32[Array, "batch max_new_tokens"]:
    model: CausalLM = nnx.merge(graphdef, state)

    def is_unfinished(loop):
        progress, _ = loop
        return (progress.step < plan.max_new_tokens) & ~jnp.all(progress.ended)

    def body(loop):
        progress, cache = loop
        return _advance(model, plan, prompt, progress, cache, sampling)

    loop = _start(model, plan, prompt, sampling)
    progress, _ = jax.lax.while_loop(is_unfinished, body, loop)
    return progress.out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start_stream(graphdef, plan, state, prompt, sampling):
    return _start(nnx.merge(graphdef, state), plan, prompt, sampling)


# The cache is updated in place.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _advance_stream(graphdef, plan, state, prompt, progress, cache, sampling):
    model = nnx.merge(graphdef, state)
    return _advance(model, plan, prompt, progress, cache, sampling)


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
                graphdef, plan, state, prompt, progress, cache, sampling
            )
        yield np.asarray(known.tokens)
        if np.asarray(known.ended).all():
            return


def _make_plan(
    model: "CausalLM",
    prompt: _Prompt,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    cache_dtype: jax.typing.DTypeLike | None,
) -> _Plan:
    eos = _token_tuple("eos_token_id", eos_token_id)
    eos = _stops(eos, model.config.vocab_size)
    pads = (*_token_tuple("pad_token_id", pad_token_id), *eos, 0)
    if not -(2**31) <= pads[0] < 2**31:
        raise ValueError(f"pad_token_id must fit in int32, got {pads[0]}")
    if cache_dtype is None:
        cache_dtype = model.model.dtype
    turn = turning_length(model.config.rope_scaling)
    if turn is not None:
        seq, is_padded = prompt.token_ids.shape[1], prompt.attention_mask is not None
        # The last token is never read. Without padding, a prompt's length is its width.
        is_reached = turn < seq + max_new_tokens - 1
        is_passed = turn < seq and not is_padded
        turn = turn if is_reached and not is_passed else None
    return _Plan(max_new_tokens, eos, pads[0], jnp.dtype(cache_dtype), turn)


def _check_prompt(
    model: "CausalLM", token_ids: Any, attention_mask: Any, max_new_tokens: int
) -> _Prompt:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    token_ids = token_array(
        token_ids,
        "token_ids",
        "Pad them on the left and give an attention_mask",
        "prompts are an integer array (batch, seq). A single prompt is token_ids[None]",
    )
    # Under a jit of the caller's, or where other hosts have a part, values are unknown.
    if not isinstance(token_ids, Tracer) and (
        isinstance(token_ids, np.ndarray) or token_ids.is_fully_addressable
    ):
        check_vocabulary(token_ids, model.config.vocab_size, "token_ids")
    token_ids = jnp.asarray(as_int32(token_ids))
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


def _token_tuple(name: str, tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """One token, several or none, as a tuple."""
    ids = np.atleast_1d(np.asarray([] if tokens is None else tokens))
    if not ids.size:
        return ()
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name} must be an int, or a sequence of them; got {tokens!r}")
    return tuple(ids.tolist())


def _stops(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The stop tokens in a model's vocabulary; a file may name some of a larger one.

    Raises:
        ValueError: there are stop tokens, but none is in the vocabulary.
    """
    possible = tuple(token for token in ids if 0 <= token < vocab_size)
    if ids and not possible:
        raise ValueError(
            f"eos_token_id {ids} is not in the vocabulary, 0 to {vocab_size - 1}, and "
            "would never end a text; give None to go on without one"
        )
    return possible
