"""Decoder: tokens to hidden states, with the positions and masks of each layer."""

from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._layer import DecoderLayer, make_norm, normalize
from jaxbnb.models._rope import depends_on_length, rope_angles
from jaxbnb.nnx import LayerStack


class Decoder(nnx.Module):
    """A `CausalLM` without its output head: tokens to hidden states.

    Attributes:
        embed_tokens: the embedding, ``(vocab, hidden)``.
        embed_positions: the embedding of positions, if the family learns one.
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
        if config.learned_positions:
            self.embed_positions = nnx.Embed(
                config.max_position_embeddings + config.position_offset,
                config.hidden_size,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
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

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: None = None,
        remat: bool = False,
    ) -> Float[Array, "batch seq hidden"]: ...

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: KVCache,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache]: ...

    def __call__(self, token_ids, *, attention_mask=None, cache=None, remat=False):
        """Returns the hidden states after the last norm; arguments as in `CausalLM`."""
        check_length(self.config, token_ids.shape[1])
        positions, mask, cache = _place_tokens(token_ids.shape, attention_mask, cache)
        get_rope = _make_rope(self.config, positions)
        get_mask = _make_masks(self.config, mask, token_ids.shape[1], cache)

        def apply(layer, carry, index):
            x, cache = carry
            return layer(x, get_rope(index), get_mask(index), cache, index)

        x = self.embed_tokens(token_ids)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.learned_positions:
            x = x + self.embed_positions(positions + self.config.position_offset)
        x, cache = self.layers(apply, (x, cache), remat=remat)
        x = normalize(self.norm, x)
        return x if cache is None else (x, cache.advance(token_ids.shape[1]))


def _place_tokens(
    shape: tuple[int, ...],
    attention_mask: Bool[Array, "batch seq"] | None,
    cache: KVCache | None,
) -> tuple[Array, Array | None, KVCache | None]:
    """Returns the positions of tokens, their mask, and the cache with a longer mask.

    Without a cache, the mask is ``(batch, 1, 1, seq)`` and must be combined with the
    causal one. With a cache, it is ``(batch, 1, seq, max_length)`` and already causal.
    """
    batch, seq = shape
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of token_ids, {shape}; "
            f"got {attention_mask.shape}"
        )
    if cache is None and attention_mask is None:
        return jnp.arange(seq)[None], None, None
    if attention_mask is None:
        attention_mask = jnp.ones((batch, seq), jnp.bool_)
    is_real = attention_mask.astype(jnp.bool_)
    positions = jnp.cumsum(is_real, axis=1) - 1
    if cache is None:
        return jnp.maximum(positions, 0), is_real[:, None, None, :], None
    extended = cache.append_mask(is_real)
    positions = jnp.maximum(positions + jnp.sum(cache.mask, axis=1)[:, None], 0)
    is_before = jnp.arange(cache.max_length) <= cache.length + jnp.arange(seq)[:, None]
    return positions, (extended.mask[:, None, :] & is_before)[:, None], extended


def _make_rope(
    config: DecoderConfig, positions: Int[Array, "#batch seq"]
) -> Callable[[Array], tuple[Array, Array] | None]:
    """Returns a function from a layer's index, which may be traced, to cosine and sine.

    Args:
        config: says which layers use which base, or no rope.
        positions: positions of the tokens. Frequencies that depend on the length use
            the longest row, as in transformers.
    """
    if config.learned_positions:
        return lambda _: None
    dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    scaling = config.rope_scaling
    length = jnp.max(positions) + 1 if depends_on_length(scaling) else 1
    angles = rope_angles(positions, dim, config.rope_theta, scaling, length)
    kinds, kind_of_layer = [angles], np.zeros(config.num_hidden_layers, np.int32)
    if config.local_rope_theta is not None:
        kinds.append(rope_angles(positions, dim, config.local_rope_theta))
        kind_of_layer[_find_windowed_layers(config)] = len(kinds) - 1
    if config.layers_without_rope:
        kinds.append((jnp.ones_like(angles[0]), jnp.zeros_like(angles[1])))
        kind_of_layer[list(config.layers_without_rope)] = len(kinds) - 1
    if len(kinds) == 1:
        return lambda _: angles
    cos, sin = (jnp.stack(part) for part in zip(*kinds, strict=True))
    which = jnp.asarray(kind_of_layer)
    return lambda layer: (cos[which[layer]], sin[which[layer]])


def _make_masks(
    config: DecoderConfig,
    mask: Bool[Array, "batch 1 #seq keys"] | None,
    seq: int,
    cache: KVCache | None,
) -> Callable[[Array], Bool[Array, "#batch 1 #seq keys"] | None]:
    """Returns a function from a layer's index to its mask: ``mask`` within its window.

    A window counts slots, so padding between tokens would count too.
    """
    keys = seq if cache is None else cache.max_length
    window = config.sliding_window
    if window is None or keys <= window:
        return lambda _: mask
    start = 0 if cache is None else cache.length
    distance = (start + jnp.arange(seq))[:, None] - jnp.arange(keys)
    windows = np.full(config.num_hidden_layers, keys, np.int32)
    windows[_find_windowed_layers(config)] = window
    windows = jnp.asarray(windows)

    def get_mask(layer):
        is_near = (distance < windows[layer])[None, None]
        return is_near if mask is None else mask & is_near

    return get_mask


def _find_windowed_layers(config: DecoderConfig) -> list[int]:
    full = {*config.full_attention_layers}
    return [layer for layer in range(config.num_hidden_layers) if layer not in full]
