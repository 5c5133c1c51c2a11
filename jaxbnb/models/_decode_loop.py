"""The compiled loop of `generate` and `generate_stream`: a token per row at a time."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxbnb.core.compiling import jit_model
from jaxbnb.models._cache import KVCache
from jaxbnb.models._sampling import Sampling, choose
from jaxbnb.sharding import find_mesh, use_mesh


class LanguageModel(Protocol):
    """What decoding needs; `CausalLM` and `EncoderDecoderLM` provide it."""

    # A Decoder, or an EncoderDecoder.
    model: Any
    config: Any

    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float32[Array, "*batch vocab"]: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments that are compiled in."""

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    cache_dtype: np.dtype
    # The length beyond which frequencies change; None if this run does not pass it.
    turn: int | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_ids", "attention_mask", "source"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What a text begins with, and for an encoder-decoder the text that it reads.

    Attributes:
        token_ids: first tokens of each row.
        attention_mask: False for padding; None if there is none.
        source: prompt of the encoder; None for a decoder.
    """

    token_ids: Int32[Array, "batch seq"]
    attention_mask: Bool[Array, "batch seq"] | None
    source: "Prompt | None" = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "tokens", "has_ended", "out"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Progress:
    """The state after ``step`` new tokens.

    Attributes:
        step: number of new tokens so far.
        tokens: last token of each row.
        has_ended: whether each row has ended.
        out: all new tokens, followed by padding.
    """

    step: Int32[Array, ""]
    tokens: Int32[Array, " batch"]
    has_ended: Bool[Array, " batch"]
    out: Int32[Array, "batch max_new_tokens"]


def _start(
    model: LanguageModel, plan: Plan, prompt: Prompt, sampling: Sampling | None
) -> tuple[_Progress, KVCache]:
    """Reads the prompt and chooses the first token."""
    batch, seq = prompt.token_ids.shape
    # The last token is returned and never read.
    length = seq + plan.max_new_tokens - 1
    if prompt.source is None:
        cache: Any = KVCache.empty(model.config, batch, length, plan.cache_dtype)
    else:
        source = model.model.encode(
            prompt.source.token_ids, attention_mask=prompt.source.attention_mask
        )
        cache = model.model.make_cache(source, length, plan.cache_dtype)
    empty = _Progress(
        step=jnp.int32(0),
        tokens=jnp.zeros(batch, jnp.int32),
        has_ended=jnp.zeros(batch, jnp.bool_),
        out=jnp.full((batch, plan.max_new_tokens), plan.pad, jnp.int32),
    )
    hidden, cache = model.model(
        prompt.token_ids, attention_mask=prompt.attention_mask, cache=cache
    )
    return _choose(model, plan, hidden[:, -1], empty, sampling), cache


def _advance(
    model: LanguageModel,
    plan: Plan,
    prompt: Prompt,
    progress: _Progress,
    cache: KVCache,
    sampling: Sampling | None,
) -> tuple[_Progress, KVCache]:
    """Reads the last token, or the whole text again if frequencies change."""

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
    model: LanguageModel,
    plan: Plan,
    prompt: Prompt,
    progress: _Progress,
    cache: KVCache,
) -> tuple[Float[Array, "batch hidden"], KVCache]:
    """Reads all tokens so far again, because the model now uses other frequencies.

    transformers does so for Phi-3. Otherwise the cache would keep keys with the old
    frequencies, and the same text given as a prompt would continue differently.
    """
    assert plan.turn is not None
    seq, last = prompt.token_ids.shape[1], cache.length
    # Only padding can make a text wider than its longest row.
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
    model: LanguageModel,
    plan: Plan,
    hidden: Float[Array, "batch hidden"],
    progress: _Progress,
    sampling: Sampling | None,
) -> _Progress:
    """Chooses the token that follows each row."""
    step, has_ended = progress.step, progress.has_ended
    tokens = choose(model.logits(hidden), step, sampling)
    tokens = jnp.where(has_ended, plan.pad, tokens)
    for eos in plan.eos:
        has_ended = has_ended | (tokens == eos)
    out = jax.lax.dynamic_update_slice(progress.out, tokens[:, None], (0, step))
    return _Progress(step + 1, tokens, has_ended, out)


def _merge(graphdef: nnx.GraphDef, state: nnx.State) -> LanguageModel:
    """Returns the model without dropout, which only training has."""
    model = nnx.merge(graphdef, state)
    model.eval()
    return model


@jit_model(static_argnums=(0, 1))
def run(
    graphdef: nnx.GraphDef,
    plan: Plan,
    state: nnx.State,
    prompt: Prompt,
    sampling: Sampling | None,
) -> Int32[Array, "batch max_new_tokens"]:
    """Generates all tokens in one program, until every row has ended."""
    model = _merge(graphdef, state)

    def is_unfinished(loop):
        progress, _ = loop
        return (progress.step < plan.max_new_tokens) & ~jnp.all(progress.has_ended)

    def body(loop):
        progress, cache = loop
        return _advance(model, plan, prompt, progress, cache, sampling)

    loop = _start(model, plan, prompt, sampling)
    progress, _ = jax.lax.while_loop(is_unfinished, body, loop)
    return progress.out


@jit_model(static_argnums=(0, 1))
def _start_stream(graphdef, plan, state, prompt, sampling):
    return _start(_merge(graphdef, state), plan, prompt, sampling)


# The cache is updated in place.
@jit_model(static_argnums=(0, 1), donate_argnums=5)
def _advance_stream(graphdef, plan, state, prompt, progress, cache, sampling):
    model = _merge(graphdef, state)
    return _advance(model, plan, prompt, progress, cache, sampling)


def stream(
    graphdef: nnx.GraphDef,
    plan: Plan,
    state: nnx.State,
    prompt: Prompt,
    sampling: Sampling | None,
) -> Iterator[Int32[np.ndarray, " batch"]]:
    """Yields each token of all rows as soon as it is known."""
    mesh = find_mesh(state)
    # Not around a yield, or the caller would be in this context, too.
    with use_mesh(mesh):
        progress, cache = _start_stream(graphdef, plan, state, prompt, sampling)
    for left in reversed(range(plan.max_new_tokens)):
        known = progress
        if left:
            with use_mesh(mesh):
                progress, cache = _advance_stream(
                    graphdef, plan, state, prompt, progress, cache, sampling
                )
        yield np.asarray(known.tokens)
        if np.asarray(known.has_ended).all():
            return
