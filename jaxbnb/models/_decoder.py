"""Decoder: tokens to hidden states, with the positions and masks of each layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxbnb.models._cache import KVCache, check_length, find_windowed_layers
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._heads import embed_tokens
from jaxbnb.models._layer import DecoderLayer, make_norm, normalize
from jaxbnb.models._positions import make_waves, slope_positions
from jaxbnb.models._rope import depends_on_length, rope_angles
from jaxbnb.models.attention import Sight
from jaxbnb.nnx import LayerStack, Remat
from jaxbnb.sharding.activations import constrain, divides_batch, gather
from jaxbnb.sharding.axis_types import check_axes, on_automatic_axes


class Decoder(nnx.Module):
    """A `CausalLM` without its output head: tokens to hidden states.

    Attributes:
        embed_tokens: the embedding, ``(vocab, hidden)``.
        embed_positions: the embedding of positions, if the family learns one.
        embed_norm: the norm that follows the embedding, if the family has one.
        layers: a `jaxbnb.nnx.LayerStack` of decoder layers; ``layers.layer`` is a
            single layer with stacked variables.
        norm: the last norm.
        config: sizes and variants.
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if config.positions == "learned":
            self.embed_positions = nnx.Embed(
                config.max_position_embeddings + config.position_offset,
                config.hidden_size,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        if config.embedding_norm:
            self.embed_norm = make_norm(config, param_dtype, rngs)
        self.layers = LayerStack(
            lambda rngs: DecoderLayer(
                config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            ),
            config.num_hidden_layers,
            rngs=rngs,
        )
        self.norm = make_norm(config, param_dtype, rngs)
        self.config = config
        self.dtype = dtype
        # A module that changes embedded tokens in training, such as by noise.
        self.embed_noise: nnx.Module | None = nnx.data(None)

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: None = None,
        embeddings: Float[Array, "batch seq hidden"] | None = None,
        remat: bool | Remat = False,
    ) -> Float[Array, "batch seq hidden"]: ...

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        segment_ids: None = None,
        cache: KVCache,
        embeddings: Float[Array, "batch seq hidden"] | None = None,
        remat: bool | Remat = False,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache]: ...

    @on_automatic_axes
    def __call__(
        self,
        token_ids,
        *,
        attention_mask=None,
        segment_ids=None,
        cache=None,
        embeddings=None,
        remat: bool | Remat = False,
    ):
        """Returns the hidden states after the last norm; arguments as in `CausalLM`.

        ``embeddings`` replace what `embed` makes of the tokens.
        """
        check_axes(self)
        check_length(self.config, token_ids.shape[1])
        for name, array in (
            ("attention_mask", attention_mask),
            ("segment_ids", segment_ids),
        ):
            _check_shape(name, array, token_ids.shape)
        if cache is not None:
            cache.check_room(*token_ids.shape)
        if segment_ids is not None:
            _check_segments(segment_ids, cache)
        size = None if cache is None else cache.part
        if cache is not None and size is not None and token_ids.shape[1] > size:
            inputs = token_ids, attention_mask, embeddings
            return self._read_parts(inputs, cache, size)
        start = 0 if cache is None else cache.length
        positions, cache = _place_tokens(
            token_ids.shape, attention_mask, segment_ids, cache
        )
        is_real = attention_mask if cache is None else cache.mask
        sight = Sight(
            num_keys=token_ids.shape[1] if cache is None else cache.max_length,
            start=start,
            is_real=None if is_real is None else is_real.astype(jnp.bool_),
            segment_ids=segment_ids,
            bias=_make_bias(self.config, positions, cache),
        )
        get_rope = _make_rope(self.config, positions)
        get_sight = _limit_sights(self.config, sight)

        how = Remat.of(remat, self.layers.remat)
        is_all_again = how is not None and not how.products
        gathers = divides_batch(token_ids)

        def apply(layer, carry, index):
            x, cache = carry
            if gathers:
                gather(layer)
            x = constrain(x, "batch", None, None)
            rope, sight = get_rope(index), get_sight(index)
            return layer(x, rope, sight, cache, index, in_chunks=is_all_again)

        x = self.embed(token_ids) if embeddings is None else embeddings
        if self.config.embedding_norm:
            x = normalize(self.embed_norm, x)
        if self.config.positions == "learned":
            x = x + self.embed_positions(positions + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            waves = make_waves(positions + self.config.position_offset, x.shape[-1])
            x = x + waves.astype(x.dtype)
        x = constrain(x, "batch", None, None)
        x, cache = self.layers(apply, (x, cache), remat=remat)
        x = constrain(normalize(self.norm, x), "batch", None, None)
        return x if cache is None else (x, cache.advance(token_ids.shape[1]))

    def embed(
        self, token_ids: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq hidden"]:
        """Embeds tokens, with noise in training, and scales them."""
        embed: Any = self.embed_tokens
        x = embed_tokens(embed, token_ids)
        if self.embed_noise is not None:
            x = self.embed_noise(x)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x

    def _read_parts(
        self,
        inputs: tuple[Array, Array | None, Array | None],
        cache: KVCache,
        size: int,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache]:
        """Reads tokens in parts of ``size``, the first of which may be shorter.

        Args:
            inputs: tokens, their mask and their embeddings.
            cache: the cache.
            size: number of tokens in a part.
        """
        batch, seq = inputs[0].shape
        first = (seq - 1) % size + 1

        def read(cache, part):
            tokens, mask, embeddings = part
            x, cache = self(
                tokens, attention_mask=mask, cache=cache, embeddings=embeddings
            )
            return cache, x

        cache, x = read(cache, jax.tree.map(lambda x: x[:, :first], inputs))
        parts = jax.tree.map(
            lambda x: (
                x[:, first:].reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)
            ),
            inputs,
        )
        cache, rest = jax.lax.scan(read, cache, parts)
        rest = rest.swapaxes(0, 1).reshape(batch, seq - first, -1)
        return jnp.concatenate([x, rest], axis=1), cache


def _check_shape(name: str, array: Array | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(
            f"{name} must have the shape of token_ids, {shape}; got {array.shape}"
        )


def _check_segments(ids: Int[Array, "batch seq"], cache: KVCache | None) -> None:
    """Checks ``segment_ids``; their order only if the values are known."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {ids.dtype}")
    if cache is not None:
        raise ValueError(
            "segment_ids say where documents in a row begin, and a KVCache holds one "
            "document in each row; give one of the two"
        )
    if isinstance(ids, Tracer):
        return
    rows = np.flatnonzero((np.diff(np.asarray(ids)) < 0).any(axis=1))
    if rows.size:
        raise ValueError(
            f"segment_ids must not decrease along a row; rows {rows.tolist()} do. "
            "Number the documents of a row in their order"
        )


def _place_tokens(
    shape: tuple[int, ...],
    attention_mask: Bool[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    cache: KVCache | None,
) -> tuple[Int[Array, "#batch seq"], KVCache | None]:
    """Returns the positions of tokens, and the cache with a longer mask.

    Positions count the tokens that are not padding, from the start of each document.
    """
    if cache is None and attention_mask is None and segment_ids is None:
        return jnp.arange(shape[1])[None], None
    if attention_mask is None:
        attention_mask = jnp.ones(shape, jnp.bool_)
    is_real = attention_mask.astype(jnp.bool_)
    positions = jnp.cumsum(is_real, axis=1) - 1
    if segment_ids is not None:
        is_first = segment_ids != jnp.roll(segment_ids, 1, axis=1)
        # Positions do not decrease, so the last start is the largest.
        starts = jnp.where(is_first, positions + 1 - is_real.astype(jnp.int32), 0)
        positions = positions - jax.lax.cummax(starts, axis=1)
    if cache is None:
        return jnp.maximum(positions, 0), None
    extended = cache.append_mask(is_real)
    before = jnp.sum(cache.mask, axis=1)[:, None]
    return jnp.maximum(positions + before, 0), extended


def _make_bias(
    config: DecoderConfig,
    positions: Int[Array, "#batch seq"],
    cache: KVCache | None,
) -> Float32[Array, "#batch heads keys"] | None:
    """Returns what the scores of each key get for its position; None for nothing.

    Args:
        config: says which bias.
        positions: positions of the tokens.
        cache: cache with the mask of these tokens and those before; its slots are the
            keys.
    """
    if config.positions not in ("alibi", "scaled_alibi"):
        return None
    if cache is not None:
        positions = jnp.cumsum(cache.mask, axis=1) - 1
    heads = config.num_attention_heads
    if config.positions == "alibi":
        return slope_positions(positions, heads)
    scale = config.attention_scale or config.head_dim**-0.5
    return scale * slope_positions(positions, heads, is_rounded=True)


def _make_rope(
    config: DecoderConfig, positions: Int[Array, "#batch seq"]
) -> Callable[[Array], tuple[Array, Array] | None]:
    """Returns a function from a layer's index, which may be traced, to cosine and sine.

    Args:
        config: says which layers use which base, or no rope.
        positions: positions of the tokens. Frequencies that depend on the length use
            the longest row, as in transformers.
    """
    if config.positions != "rope":
        return lambda _: None
    dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    scaling = config.rope_scaling
    length = jnp.max(positions) + 1 if depends_on_length(scaling) else 1
    angles = rope_angles(positions, dim, config.rope_theta, scaling, length)
    kinds, kind_of_layer = [angles], np.zeros(config.num_hidden_layers, np.int32)
    if config.local_rope_theta is not None:
        kinds.append(rope_angles(positions, dim, config.local_rope_theta))
        kind_of_layer[[*find_windowed_layers(config)]] = len(kinds) - 1
    if config.layers_without_rope:
        kinds.append((jnp.ones_like(angles[0]), jnp.zeros_like(angles[1])))
        kind_of_layer[list(config.layers_without_rope)] = len(kinds) - 1
    if len(kinds) == 1:
        return lambda _: angles
    cos, sin = (jnp.stack(part) for part in zip(*kinds, strict=True))
    which = jnp.asarray(kind_of_layer)
    return lambda layer: (cos[which[layer]], sin[which[layer]])


def _limit_sights(config: DecoderConfig, sight: Sight) -> Callable[[Array], Sight]:
    """Returns a function from a layer's index to its sight, within its window.

    A window counts slots, so padding between tokens would count too.
    """
    window, layers = config.sliding_window, find_windowed_layers(config)
    if window is None or sight.num_keys <= window or not layers:
        return lambda _: sight
    if len(layers) == config.num_hidden_layers:
        limited = dataclasses.replace(sight, window=window)
        return lambda _: limited
    windows = np.full(config.num_hidden_layers, sight.num_keys, np.int32)
    windows[[*layers]] = window
    windows = jnp.asarray(windows)
    return lambda layer: dataclasses.replace(sight, window=windows[layer])
