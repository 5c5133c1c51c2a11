"""One decoder layer: attention, MLP or experts, and the norms around them."""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from jaxbnb.models._cache import KVCache
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._experts import Experts
from jaxbnb.models._rope import rotate

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
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array] | None,
        mask: Bool[Array, "#batch 1 #seq keys"] | None,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        batch, seq, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, seq, -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = normalize(self.q_norm, q), normalize(self.k_norm, k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.read(layer, q.dtype)
        # With a cache, keys are slots rather than the queries' positions, and the mask
        # is causal already.
        y = _attend(self.config, q, k, v, mask, is_causal=cache is None)
        return self.o_proj(y.reshape(batch, seq, -1)), cache


def _attend(
    config: DecoderConfig,
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch 1 #seq keys"] | None,
    *,
    is_causal: bool,
) -> Float[Array, "batch seq heads head_dim"]:
    """Multiplies softmax of the scores, computed in float32, by the values."""
    scale, cap = config.attention_scale, config.attention_softcap
    if cap is None:
        # JAX computes this softmax in float32 for any dtype of q. Strict promotion
        # would refuse that for 16 bits.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, scale=scale, is_causal=is_causal
            )
    batch, seq, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    # Put query heads that share a key head next to each other.
    q = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    products = jnp.einsum("bsngd,bknd->bngsk", q, k, preferred_element_type=jnp.float32)
    products = soften(products * scale, cap)
    if is_causal:
        is_before = jnp.tril(jnp.ones((seq, seq), jnp.bool_))
        mask = is_before if mask is None else mask & is_before
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, 1, seq, k.shape[1]))[:, :, None]
        # A finite value, so that a row of padding, which sees nothing, is not NaN.
        products = jnp.where(mask, products, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(products).astype(v.dtype)
    return jnp.einsum("bngsk,bknd->bsngd", weights, v).reshape(
        batch, seq, heads, head_dim
    )


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
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        act = _ACTIVATIONS[self.config.activation]
        if self.config.gated_mlp:
            return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(act(self.up_proj(x)))


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
        mask: Bool[Array, "#batch 1 #seq keys"] | None,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        y = normalize(self.input_layernorm, x)
        y, cache = self.self_attn(y, rope, mask, cache, layer)
        # Gemma gives the norm after attention the name that Llama gives the one before
        # the MLP.
        if self.config.post_norms:
            x = x + normalize(self.post_attention_layernorm, y)
            y = self.mlp(normalize(self.pre_feedforward_layernorm, x))
            return x + normalize(self.post_feedforward_layernorm, y), cache
        if self.config.parallel_residual:
            return x + y + self.mlp(normalize(self.post_attention_layernorm, x)), cache
        x = x + y
        return x + self.mlp(normalize(self.post_attention_layernorm, x)), cache


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


def soften(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Computes ``cap * tanh(x / cap)``, which stays below the cap; ``x`` for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
