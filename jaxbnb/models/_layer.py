"""One decoder layer: attention, MLP or experts, and the norms around them."""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.models._cache import KVCache
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._experts import Experts
from jaxbnb.models._rope import rotate
from jaxbnb.models.attention import Sight, attend, attend_slots
from jaxbnb.nnx import keep_product
from jaxbnb.sharding.activations import constrain, rows_of_device

# Number of tokens to apply an MLP to at once, where all of it is computed again.
CHUNK: Final = 2048
_ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Attention(nnx.Module):
    """Causal self-attention; groups of query heads may share key and value heads."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        bias, output_bias = config.attention_bias, config.output_bias
        linear = functools.partial(
            nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.q_proj = linear(hidden, queries, use_bias=bias)
        self.k_proj = linear(hidden, keys, use_bias=bias)
        self.v_proj = linear(hidden, keys, use_bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = linear(queries, hidden, use_bias=output_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, param_dtype, rngs, config.head_dim)
            self.k_norm = make_norm(config, param_dtype, rngs, config.head_dim)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, param_dtype))
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array] | None,
        sight: Sight,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        batch, seq, _ = x.shape
        q, k, v = (
            keep_product(project(x)).reshape(batch, seq, -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = normalize(self.q_norm, q), normalize(self.k_norm, k)
        q, k, v = (constrain(x, "batch", None, "heads", None) for x in (q, k, v))
        if rope is not None:
            is_interleaved = self.config.interleaved_rope
            q, k = (rotate(x, *rope, is_interleaved) for x in (q, k))
        options: dict[str, Any] = {
            "scale": self.config.attention_scale,
            "softcap": self.config.attention_softcap,
            "sinks": self.sinks[...] if self.config.attention_sinks else None,
        }
        if cache is None:
            y = attend(q, k, v, sight, **options)
        else:
            old = cache

            def attend_cached(is_near, index):
                new = old.write(is_near, index, k, v)
                read = functools.partial(new.read, is_near, index, q.dtype)
                seen = sight.in_ring(new.near_size) if is_near else sight
                return attend_slots(q, read, seen, **options), new

            y, cache = cache.each_kind(layer, attend_cached)
        return keep_product(self.o_proj(y.reshape(batch, seq, -1))), cache


class MLP(nnx.Module):
    """The feed-forward network: ``down(act(up(x)))``.

    With a gate, it is ``down(act(gate(x)) * up(x))``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.mlp_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if config.gated_mlp:
            self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        project: Callable[[Any, Array], Array] = lambda layer, x: keep_product(
            layer(x)
        ),
    ) -> Float[Array, "*batch hidden"]:
        """Applies it; ``project(layer, x)`` says how a linear layer is applied."""
        act = _ACTIVATIONS[self.config.activation]
        limit = self.config.swiglu_limit
        if limit is not None:
            gate = jnp.minimum(project(self.gate_proj, x), limit)
            up = jnp.clip(project(self.up_proj, x), -limit, limit)
            gate = gate * jax.nn.sigmoid(gate * self.config.swiglu_alpha)
            inner = (up + 1) * gate
        elif self.config.gated_mlp:
            gate, up = project(self.gate_proj, x), project(self.up_proj, x)
            inner = in_float32(lambda gate, up: act(gate) * up, gate, up)
        else:
            inner = in_float32(act, project(self.up_proj, x))
        if inner.ndim == 3:
            inner = constrain(inner, "batch", None, "mlp")
        return project(self.down_proj, inner)


def in_float32(function: Callable[..., Array], *arrays: Array) -> Array:
    """Computes an elementwise function in float32, and rounds to the arrays' dtype.

    XLA on a CPU would round after each operation in 16 bits, which takes three times
    as long. A backward pass keeps the arrays only, and computes the function again.
    """
    if arrays[0].dtype.itemsize != 2:
        return function(*arrays)

    # In the loop over layers, XLA cannot merge the two computations.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def compute(*arrays):
        result = function(*(x.astype(jnp.float32) for x in arrays))
        return result.astype(arrays[0].dtype)

    return compute(*arrays)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        norm = functools.partial(make_norm, config, param_dtype, rngs)

        def make_mlp(rngs: nnx.Rngs) -> MLP:
            return MLP(config, **dtypes, rngs=rngs)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, **dtypes, rngs=rngs)
        if not config.shared_norm:
            self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        if config.num_experts:
            self.mlp = Experts(config, make_mlp, param_dtype=param_dtype, rngs=rngs)
        else:
            self.mlp = make_mlp(rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array] | None,
        sight: Sight,
        cache: KVCache | None,
        layer: Array,
        *,
        in_chunks: bool = False,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        """Applies the layer.

        Args:
            x: the residual stream.
            rope: cosines and sines of the positions; None for no rope.
            sight: which tokens each token sees.
            cache: keys and values of the tokens before, if there are any.
            layer: number of this layer.
            in_chunks: whether the MLP of a long text is applied to chunks of tokens,
                because a backward pass computes all of it again.
        """
        y = normalize(self.input_layernorm, x)
        y, cache = self.self_attn(y, rope, sight, cache, layer)
        feed = self._feed_chunks if in_chunks else self._feed
        if self.config.post_norms:
            # Gemma gives the norm after attention the name that Llama gives the one
            # before the MLP.
            x = x + normalize(self.post_attention_layernorm, y)
            return x + feed(x), cache
        if self.config.parallel_residual:
            return x + y + feed(x), cache
        x = x + y
        return x + feed(x), cache

    def _feed(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        """Applies the MLP and the norms around it."""
        if self.config.post_norms:
            y = self.mlp(normalize(self.pre_feedforward_layernorm, x))
            return normalize(self.post_feedforward_layernorm, y)
        if self.config.shared_norm:
            # XLA computes the norm once for attention and MLP.
            return self.mlp(normalize(self.input_layernorm, x))
        return self.mlp(normalize(self.post_attention_layernorm, x))

    def _feed_chunks(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        """Applies `_feed` to chunks of tokens, each recomputed by itself.

        The intermediate values of an MLP are the largest arrays of a long text.
        """
        batch, seq, _ = x.shape
        size = max(1, CHUNK // max(1, rows_of_device(x)))
        if seq <= size:
            return self._feed(x)
        # The counts of random streams, so that each chunk has its own dropout.
        graphdef, counts, rest = nnx.split(self, nnx.RngCount, ...)

        @jax.checkpoint
        def feed(counts, chunk):
            layer = nnx.merge(graphdef, counts, rest)
            chunk = layer._feed(chunk)
            return nnx.state(layer, nnx.RngCount), chunk

        chunks = jnp.pad(x, [(0, 0), (0, -seq % size), (0, 0)])
        chunks = chunks.reshape(batch, -1, size, x.shape[-1]).swapaxes(0, 1)
        counts, chunks = jax.lax.scan(feed, counts, chunks)
        nnx.update(self, counts)
        return chunks.swapaxes(0, 1).reshape(batch, -1, x.shape[-1])[:, :seq]


class PlusOneRMSNorm(nnx.Module):
    """Gemma's RMSNorm, which multiplies by ``1 + scale``."""

    def __init__(
        self, features: int, epsilon: float, param_dtype: jax.typing.DTypeLike
    ):
        self.scale = nnx.Param(jnp.zeros(features, param_dtype))
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float32[Array, "*batch features"]:
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.epsilon)
        return x * (1.0 + self.scale[...].astype(jnp.float32))


Norm = nnx.RMSNorm | nnx.LayerNorm | PlusOneRMSNorm


def make_norm(
    config: DecoderConfig,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    features: int | None = None,
) -> Norm:
    """Makes a norm that computes in float32, by default for the residual stream."""
    features = config.hidden_size if features is None else features
    if config.norm == "rms_plus_one":
        return PlusOneRMSNorm(features, config.rms_norm_eps, param_dtype)
    options: dict[str, Any] = {
        "epsilon": config.rms_norm_eps,
        "dtype": jnp.float32,
        "param_dtype": param_dtype,
        "rngs": rngs,
    }
    if config.norm == "layer":
        # The fast variance, mean(x^2) - mean(x)^2, cancels if the mean is large.
        return nnx.LayerNorm(features, use_fast_variance=False, **options)
    return nnx.RMSNorm(features, **options)


def normalize(
    norm: Norm, x: Float[Array, "*batch features"]
) -> Float[Array, "*batch features"]:
    """Applies a norm and rounds to the dtype of ``x``."""
    return norm(x).astype(x.dtype)
