"""EncoderDecoder: reads a text in both directions, and writes another from it."""

import dataclasses
import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._encoder_decoder_config import EncoderDecoderConfig
from jaxbnb.models._heads import embed_tokens
from jaxbnb.models._layer import MLP, make_norm, normalize
from jaxbnb.models._pairs import PairAttention, Pairs, make_bias
from jaxbnb.nnx import LayerStack, Remat
from jaxbnb.sharding.activations import (
    constrain,
    divides_batch,
    gather,
    gathered,
)
from jaxbnb.sharding.axis_types import check_axes, divide_rows, on_automatic_axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "mask"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What the encoder makes of a text.

    Attributes:
        hidden: hidden states of its tokens.
        mask: False for padding; None if there is none.
    """

    hidden: Float[Array, "batch source hidden"]
    mask: Bool[Array, "batch source"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("written", "source"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class EncoderDecoderCache:
    """Keys and values of each layer of a decoder.

    Attributes:
        written: those of the tokens so far.
        source: those of the source, which are computed once.
    """

    written: KVCache
    source: KVCache


class EncoderLayer(nnx.Module):
    """Self-attention in both directions, and an MLP."""

    def __init__(
        self, config: DecoderConfig, *, has_key_bias: bool = True, **options: Any
    ):
        norm = functools.partial(
            make_norm, config, options["param_dtype"], options["rngs"]
        )
        self.input_layernorm = norm()
        self.self_attn = PairAttention(config, has_key_bias=has_key_bias, **options)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, **options)

    def __call__(
        self, x: Float[Array, "batch seq hidden"], pairs: Pairs
    ) -> Float[Array, "batch seq hidden"]:
        y = normalize(self.input_layernorm, x)
        x = _bound(x + self.self_attn(y, *self.self_attn.read(y), pairs))
        return _bound(x + self.mlp(normalize(self.post_attention_layernorm, x)))


class CrossLayer(nnx.Module):
    """Causal self-attention, attention to the source, and an MLP."""

    def __init__(
        self, config: DecoderConfig, *, has_key_bias: bool = True, **options: Any
    ):
        norm = functools.partial(
            make_norm, config, options["param_dtype"], options["rngs"]
        )
        attention = functools.partial(
            PairAttention, config, has_key_bias=has_key_bias, **options
        )
        self.input_layernorm = norm()
        self.self_attn = attention()
        self.cross_attention_layernorm = norm()
        self.cross_attn = attention()
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, **options)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        pairs: Pairs,
        source: Source | KVCache,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        """Applies the layer.

        Args:
            x: the residual stream.
            pairs: which tokens each token sees.
            source: the source, or its keys and values.
            cache: keys and values of the tokens before, if there are any.
            layer: number of this layer.
        """
        y = normalize(self.input_layernorm, x)
        keys, values = self.self_attn.read(y)
        if cache is not None:
            cache = cache.write(False, layer, keys, values)
            keys, values = _read_all(cache, layer, x.dtype)
        x = _bound(x + self.self_attn(y, keys, values, pairs))
        y = normalize(self.cross_attention_layernorm, x)
        if isinstance(source, KVCache):
            keys, values = _read_all(source, layer, x.dtype)
        else:
            keys, values = self.cross_attn.read(source.hidden)
        x = _bound(x + self.cross_attn(y, keys, values, Pairs(source.mask)))
        x = _bound(x + self.mlp(normalize(self.post_attention_layernorm, x)))
        return x, cache


class Stack(nnx.Module):
    """The layers of an encoder or a decoder, the norm after them, and their bias."""

    def __init__(
        self,
        kind: type[EncoderLayer | CrossLayer],
        num_layers: int,
        config: EncoderDecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        if config.num_buckets:
            self.relative_bias = nnx.Embed(
                config.num_buckets,
                config.decoder.num_attention_heads,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        self.layers = LayerStack(
            lambda rngs: kind(
                config.decoder,
                has_key_bias=config.has_key_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            ),
            num_layers,
            rngs=rngs,
        )
        self.norm = make_norm(config.decoder, param_dtype, rngs)


class AudioStem(nnx.Module):
    """Log-mel features to the encoder's input: two convolutions, and positions."""

    def __init__(self, config: EncoderDecoderConfig, **options: Any):
        hidden = config.decoder.hidden_size
        conv = functools.partial(
            nnx.Conv, out_features=hidden, kernel_size=(3,), padding=1, **options
        )
        self.conv1 = conv(config.num_mel_bins)
        self.conv2 = conv(hidden, strides=2)
        positions = config.max_source_positions
        self.embed_positions = nnx.Embed(positions, hidden, **options)

    def __call__(
        self, features: Float[Array, "batch mel_bins frames"]
    ) -> Float[Array, "batch source hidden"]:
        x = features.swapaxes(1, 2).astype(self.conv1.dtype)
        for conv in (self.conv1, self.conv2):
            x = jax.nn.gelu(conv(x), approximate=False)
        return x + self.embed_positions(jnp.arange(x.shape[1]))


class EncoderDecoder(nnx.Module):
    """An `EncoderDecoderLM` without its output head.

    Attributes:
        embed_tokens: the embedding of both texts, ``(vocab, hidden)``.
        embed_positions: the embedding of the decoder's positions, if the family learns
            one.
        stem: what comes before the encoder, if it reads audio.
        encoder: layers that see all of the source.
        decoder: layers that see the source, and the tokens before.
        config: sizes and variants.
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        decoder = config.decoder
        self.embed_tokens = nnx.Embed(
            decoder.vocab_size, decoder.hidden_size, **options
        )
        if decoder.positions == "learned":
            self.embed_positions = nnx.Embed(
                decoder.max_position_embeddings, decoder.hidden_size, **options
            )
        if config.num_mel_bins:
            self.stem = AudioStem(config, **options)
        self.encoder = Stack(EncoderLayer, config.num_encoder_layers, config, **options)
        self.decoder = Stack(CrossLayer, decoder.num_hidden_layers, config, **options)
        self.config = config
        self.dtype = dtype

    @on_automatic_axes
    def encode(
        self,
        inputs: Int[Array, "batch source"] | Float[Array, "batch mel_bins frames"],
        *,
        attention_mask: Bool[Array, "batch source"] | None = None,
        remat: bool | Remat = False,
    ) -> Source:
        """Reads the source.

        Args:
            inputs: tokens of the source, padded on either side; or log-mel features.
            attention_mask: False for padding; None for no padding.
            remat: see `EncoderDecoderLM`.

        Raises:
            ValueError: the mask has another shape than the tokens, or features have
                another than the model takes.
        """
        check_axes(self)
        if self.config.num_mel_bins:
            check_features(self.config, inputs, attention_mask)
            x = gathered(self.stem)(inputs)
        else:
            _check_mask("attention_mask", attention_mask, inputs.shape)
            x = embed_tokens(self.embed_tokens, inputs)
        mask = None if attention_mask is None else attention_mask.astype(jnp.bool_)
        pairs = Pairs(mask, bias=self._make_bias(self.encoder, is_causal=False))

        x = run_encoder(self.encoder.layers, x, pairs, remat)
        x = constrain(normalize(self.encoder.norm, x), "batch", None, None)
        return Source(x, mask)

    def make_cache(
        self, source: Source, max_length: int, dtype: jax.typing.DTypeLike
    ) -> EncoderDecoderCache:
        """Makes a cache for ``max_length`` tokens, and reads the source into it.

        On explicit axes of a mesh, its rows are divided as those of the source.

        Args:
            source: what `encode` returns.
            max_length: number of tokens of the decoder.
            dtype: dtype of keys and values, floating or int8.
        """

        def divide(x: Array) -> Array:
            # Keys and values have an axis of layers first, and masks have not.
            return divide_rows(x, source.hidden, axis=0 if x.ndim == 2 else 1)

        return jax.tree.map(divide, self._read_source(source, max_length, dtype))

    @on_automatic_axes
    def _read_source(
        self, source: Source, max_length: int, dtype: jax.typing.DTypeLike
    ) -> EncoderDecoderCache:
        check_axes(self)
        decoder = self.config.decoder
        batch, length, _ = source.hidden.shape
        # A source may have more positions than the decoder.
        longer = dataclasses.replace(decoder, max_position_embeddings=length)
        cache = KVCache.empty(longer, batch, length, dtype)
        mask = jnp.ones((batch, length), bool) if source.mask is None else source.mask
        gathers = divides_batch(source.hidden)

        def read(layer, cache, index):
            if gathers:
                gather(layer.cross_attn)
            return cache.write(False, index, *layer.cross_attn.read(source.hidden))

        cache = self.decoder.layers(read, cache.append_mask(mask))
        written = KVCache.empty(decoder, batch, max_length, dtype)
        return EncoderDecoderCache(written, cache.advance(length))

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        source: Source,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: None = None,
        remat: bool | Remat = False,
    ) -> Float[Array, "batch seq hidden"]: ...

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        source: None = None,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: EncoderDecoderCache,
        remat: bool | Remat = False,
    ) -> tuple[Float[Array, "batch seq hidden"], EncoderDecoderCache]: ...

    @on_automatic_axes
    def __call__(
        self,
        token_ids,
        *,
        source=None,
        attention_mask=None,
        cache=None,
        remat: bool | Remat = False,
    ):
        """Returns the hidden states of the decoder's tokens after the last norm.

        Args:
            token_ids: tokens of the decoder; they continue those in ``cache``.
            source: what `encode` returns; None with a cache, which holds it.
            attention_mask: False for padding among the decoder's tokens.
            cache: cache that `make_cache` returns.
            remat: see `EncoderDecoderLM`.

        Raises:
            ValueError: not exactly one of ``source`` and ``cache`` is given; shapes
                differ; there are more tokens than the model takes; or the cache has no
                room.
        """
        check_axes(self)
        if (source is None) == (cache is None):
            raise ValueError(
                "the decoder of an encoder-decoder needs a source: give source= from "
                "encode, or cache= from make_cache"
            )
        _check_mask("attention_mask", attention_mask, token_ids.shape)
        check_length(self.config.decoder, token_ids.shape[1])
        written, start, is_real = None, 0, attention_mask
        if cache is not None:
            cache.written.check_room(*token_ids.shape)
            if is_real is None:
                is_real = jnp.ones(token_ids.shape, jnp.bool_)
            start = cache.written.length
            written = cache.written.append_mask(is_real.astype(jnp.bool_))
            source, is_real = cache.source, written.mask
        is_real = None if is_real is None else is_real.astype(jnp.bool_)
        bias = self._make_bias(self.decoder, is_causal=True)
        pairs = Pairs(is_real, start, bias)
        gathers = divides_batch(token_ids)

        def apply(layer, carry, index):
            x, written = carry
            if gathers:
                gather(layer)
            x = constrain(x, "batch", None, None)
            return layer(x, pairs, source, written, index)

        x = embed_tokens(self.embed_tokens, token_ids)
        if self.config.decoder.positions == "learned":
            positions = start + jnp.arange(token_ids.shape[1])
            x = x + self.embed_positions(positions)
        x = constrain(x, "batch", None, None)
        x, written = self.decoder.layers(apply, (x, written), remat=remat)
        x = constrain(normalize(self.decoder.norm, x), "batch", None, None)
        if cache is None or written is None:
            return x
        return x, EncoderDecoderCache(written.advance(token_ids.shape[1]), cache.source)

    def _make_bias(self, stack: Stack, *, is_causal: bool) -> Any:
        if not self.config.num_buckets:
            return None
        # Called, because an adapter may have replaced it.
        table = stack.relative_bias(jnp.arange(self.config.num_buckets))
        return make_bias(table, self.config.max_distance, is_causal=is_causal)


def run_encoder(
    layers: LayerStack, x: Array, pairs: Pairs, remat: bool | Remat
) -> Array:
    """Runs layers that see all of a text or an image."""
    gathers = divides_batch(x)

    def apply(layer, x, _):
        if gathers:
            gather(layer)
        return layer(constrain(x, "batch", None, None), pairs)

    return layers(apply, constrain(x, "batch", None, None), remat=remat)


def check_features(
    config: EncoderDecoderConfig, features: Any, attention_mask: Any
) -> None:
    """Raises ValueError for features that a model of audio does not take."""
    want = config.num_mel_bins, 2 * config.max_source_positions
    if features.ndim != 3 or features.shape[1:] != want:
        raise ValueError(
            f"the source must be log-mel features (batch, mel bins, frames), with "
            f"{want} after the first; got {features.shape}"
        )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is for tokens; features are padded with silence, which "
            "the model hears"
        )


def _read_all(cache: KVCache, layer: Array, dtype: Any) -> tuple[Array, Array]:
    return cache.read(False, layer, dtype, jnp.int32(0), cache.max_length)


def _bound(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Keeps float16 finite: T5 was trained in bfloat16, and its values grow large."""
    if x.dtype != jnp.float16:
        return x
    most = float(jnp.finfo(jnp.float16).max) - 1000
    return jnp.clip(x, -most, most)


def _check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"{name} must have the shape of its tokens, {shape}; got {mask.shape}"
        )
