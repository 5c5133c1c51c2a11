"""CausalLM: the model, its attributes named as in Llama's checkpoints."""

import dataclasses
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxbnb.core import QuantizedArray, matmul
from jaxbnb.lora.file_names import FileLayer
from jaxbnb.models._cache import KVCache, check_length
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._decoder import DecoderLayer, make_norm, normalize, soften
from jaxbnb.models._generate import generate
from jaxbnb.models._names import file_layer, full_name
from jaxbnb.models._rope import depends_on_length, rope_angles
from jaxbnb.models.families import FAMILIES
from jaxbnb.nnx import LayerStack


class Decoder(nnx.Module):
    """All of a `CausalLM` but the output head: tokens to hidden states.

    Attributes:
        embed_tokens: the embedding, ``(vocab, hidden)``.
        embed_positions: the embedding of positions, where the family learns one.
        layers: a `jaxbnb.nnx.LayerStack` of decoder layers; ``layers.layer`` is the one
            layer whose variables are stacked.
        norm: the last norm.
        config: its sizes.
        dtype: of the computation.
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
        """Hidden states after the last norm; the arguments are those of `CausalLM`."""
        check_length(self.config, token_ids.shape[1])
        positions, mask, cache = _place(token_ids.shape, attention_mask, cache)
        rope = _rope_of_layer(self.config, positions)
        mask = _mask_of_layer(self.config, mask, token_ids.shape[1], cache)

        def apply(layer, carry, index):
            x, cache = carry
            return layer(x, rope(index), mask(index), cache, index)

        x = self.embed_tokens(token_ids)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.learned_positions:
            x = x + self.embed_positions(positions + self.config.position_offset)
        x, cache = self.layers(apply, (x, cache), remat=remat)
        x = normalize(self.norm, x)
        return x if cache is None else (x, cache.advance(token_ids.shape[1]))


class CausalLM(nnx.Module):
    """A decoder-only model: tokens to the logits of the next token at every position.

    One class for all families; ``config`` says what is different. The dotted path of a
    variable is its name in Hugging Face's checkpoints of a Llama, whatever the family
    calls it, but that the decoder layers are stacked:
    ``model.layers.layer.mlp.up_proj.kernel`` is
    ``(num_hidden_layers, hidden, intermediate)``. Linear layers may be replaced, e.g.
    by `jaxbnb.nnx.quantize_model`. ``Llama`` is another name of this class.

    Call it under ``jax.jit`` or ``nnx.jit``: eagerly, its loop over the layers is
    compiled anew each time.

    Attributes:
        model: everything up to the last norm; ``model.model(token_ids)`` are hidden
            states, of which `logits` takes any part.
        lm_head: the output head, or None when it is the embedding.
        config: its sizes.

    Args:
        config: its sizes.
        dtype: of the computation; None for ``param_dtype``. Norms, rope and softmax
            are computed in float32 whatever it is, and logits are float32.
        param_dtype: of the variables.
        rngs: its ``params`` stream seeds the initializers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape
        (2, 64, 128)
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = param_dtype if dtype is None else dtype
        self.model = Decoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lm_head: nnx.Linear | None = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = _make_head(config, dtype, param_dtype, rngs)
        self.config = config

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: None = None,
        remat: bool = False,
    ) -> Float32[Array, "batch seq vocab"]: ...

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        cache: KVCache,
        remat: bool = False,
    ) -> tuple[Float32[Array, "batch seq vocab"], KVCache]: ...

    def __call__(self, token_ids, *, attention_mask=None, cache=None, remat=False):
        """Logits of the token that follows each token.

        Args:
            token_ids: the tokens; after those in ``cache``, if any.
            attention_mask: False for padding, which no token attends to; positions
                count the tokens that are True. None for all True.
            cache: of the tokens before, which are attended to as well.
            remat: recompute each layer in the backward pass rather than keep its
                intermediate values.

        Returns:
            The logits, and with a ``cache`` also the cache with these tokens. At
            padding they mean nothing.

        Raises:
            ValueError: more tokens than the model takes or the cache has room for.
        """
        options = {"attention_mask": attention_mask, "remat": remat}
        if cache is None:
            return self.logits(self.model(token_ids, **options))
        hidden, cache = self.model(token_ids, cache=cache, **options)
        return self.logits(hidden), cache

    def generate(
        self,
        token_ids: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
        max_new_tokens: int,
        **options: Any,
    ) -> Int32[Array, "batch max_new_tokens"]:
        """Continues each prompt; see `jaxbnb.models.generate`, which has the options.

        Args:
            token_ids: the prompts, padded on the left.
            max_new_tokens: tokens to make.
            **options: ``temperature``, ``top_k``, ``top_p``, ``key``,
                ``eos_token_id``, ``pad_token_id``, ``attention_mask``, ``cache_dtype``.
        """
        return generate(self, token_ids, max_new_tokens, **options)

    def untie_head(self) -> None:
        """Gives a model whose head is its embedding a copy as a head of its own.

        It computes the same, up to rounding where the embedding is quantised. An
        adapter of ``lm_head`` needs it, because the embedding must stay as it is.

        Example:
            >>> from flax import nnx
            >>> from jaxbnb.models import CausalLM, DecoderConfig
            >>> config = DecoderConfig(
            ...     vocab_size=256, hidden_size=64, intermediate_size=128,
            ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            ...     head_dim=16, tie_word_embeddings=True)
            >>> model = CausalLM(config, rngs=nnx.Rngs(0))
            >>> model.untie_head()
            >>> model.lm_head.kernel.shape, model.config.tie_word_embeddings
            ((64, 256), False)
        """
        if self.lm_head is not None:
            return
        embedding: Any = self.model.embed_tokens.embedding.get_value()
        if isinstance(embedding, QuantizedArray):
            embedding = embedding.dequantize()
        config, dtype = self.config, self.model.dtype
        head = nnx.eval_shape(
            lambda: _make_head(config, dtype, embedding.dtype, nnx.Rngs(0))
        )
        head.kernel = nnx.Param(embedding.T)
        self.lm_head = head
        self.config = dataclasses.replace(config, tie_word_embeddings=False)

    def file_layer(self, name: str) -> FileLayer:
        """What a linear layer is in the files of its family, e.g. in PEFT's.

        Args:
            name: its dotted path, numbered: "model.layers.3.self_attn.q_proj".
        """
        return file_layer(name, self.config)

    def file_name(self, name: str) -> str:
        """The name in files, of a module as another version of transformers has it."""
        family = FAMILIES[self.config.model_type]
        name = full_name(name, family)
        return "lm_head" if name == family.names.get("lm_head") else name

    def is_transposed_in_files(self) -> bool:
        """Whether its files have kernels as ``(in, out)``."""
        return not FAMILIES[self.config.model_type].transposed

    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float32[Array, "*batch vocab"]:
        """The output head: of all hidden states, or of the few that a loss looks at."""
        return soften(self._head(hidden), self.config.logit_softcap)

    def _head(self, hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "..."]:
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        # An embedding's own attend rounds logits to the dtype of the computation.
        embedding: Any = self.model.embed_tokens.embedding[...]
        if isinstance(embedding, QuantizedArray):
            logits = hidden.astype(jnp.float32)
            return matmul(logits, embedding.mT, compute_dtype=hidden.dtype)
        embedding = embedding.astype(hidden.dtype)
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            hidden, embedding, contract, preferred_element_type=jnp.float32
        )


def _make_head(
    config: DecoderConfig,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    return nnx.Linear(
        config.hidden_size,
        config.vocab_size,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def _place(
    shape: tuple[int, ...],
    attention_mask: Bool[Array, "batch seq"] | None,
    cache: KVCache | None,
) -> tuple[Array, Array | None, KVCache | None]:
    """Positions of the tokens, what they may attend to, and the cache that knows them.

    The mask is ``(batch, 1, 1, seq)``, to be combined with the causal one; or, with a
    cache, ``(batch, 1, seq, max_length)``, causal itself.
    """
    batch, seq = shape
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be of the shape of token_ids, {shape}; "
            f"got {attention_mask.shape}"
        )
    if cache is None and attention_mask is None:
        return jnp.arange(seq)[None], None, None
    if attention_mask is None:
        attention_mask = jnp.ones((batch, seq), jnp.bool_)
    real = attention_mask.astype(jnp.bool_)
    positions = jnp.cumsum(real, axis=1) - 1
    if cache is None:
        return jnp.maximum(positions, 0), real[:, None, None, :], None
    extended = cache.append_mask(real)
    positions = jnp.maximum(positions + jnp.sum(cache.mask, axis=1)[:, None], 0)
    causal = jnp.arange(cache.max_length) <= cache.length + jnp.arange(seq)[:, None]
    return positions, (extended.mask[:, None, :] & causal)[:, None], extended


def _rope_of_layer(
    config: DecoderConfig, positions: Int[Array, "#batch seq"]
) -> Callable[[Array], tuple[Array, Array] | None]:
    """Cosine and sine by the index of a layer, which is traced.

    Args:
        config: which layers have which base, or no rope.
        positions: positions of the tokens. Frequencies that depend on the length use
            that of the longest row, as in transformers.
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
        kind_of_layer[_windowed_layers(config)] = len(kinds) - 1
    if config.layers_without_rope:
        kinds.append((jnp.ones_like(angles[0]), jnp.zeros_like(angles[1])))
        kind_of_layer[list(config.layers_without_rope)] = len(kinds) - 1
    if len(kinds) == 1:
        return lambda _: angles
    cos, sin = (jnp.stack(part) for part in zip(*kinds, strict=True))
    which = jnp.asarray(kind_of_layer)
    return lambda layer: (cos[which[layer]], sin[which[layer]])


def _mask_of_layer(
    config: DecoderConfig,
    mask: Bool[Array, "batch 1 #seq keys"] | None,
    seq: int,
    cache: KVCache | None,
) -> Callable[[Array], Bool[Array, "#batch 1 #seq keys"] | None]:
    """What tokens may attend to, by the index of a layer: ``mask`` within its window.

    A window counts slots, so padding between tokens would be in it.
    """
    keys = seq if cache is None else cache.max_length
    window = config.sliding_window
    if window is None or keys <= window:
        return lambda _: mask
    start = 0 if cache is None else cache.length
    distance = (start + jnp.arange(seq))[:, None] - jnp.arange(keys)
    windows = np.full(config.num_hidden_layers, keys, np.int32)
    windows[_windowed_layers(config)] = window
    windows = jnp.asarray(windows)

    def of_layer(layer):
        near = (distance < windows[layer])[None, None]
        return near if mask is None else mask & near

    return of_layer


def _windowed_layers(config: DecoderConfig) -> list[int]:
    full = {*config.full_attention_layers}
    return [layer for layer in range(config.num_hidden_layers) if layer not in full]
