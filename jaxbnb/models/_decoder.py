"""One decoder layer of a Llama: attention, MLP, and the norms before them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxbnb.models._cache import KVCache
from jaxbnb.models._config import LlamaConfig
from jaxbnb.models._rope import rotate


class Attention(nnx.Module):
    """Causal self-attention; query heads share key and value heads in groups."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.attention_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.q_proj = linear(hidden, queries)
        self.k_proj = linear(hidden, keys)
        self.v_proj = linear(hidden, keys)
        self.o_proj = linear(queries, hidden)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Bool[Array, "batch 1 #seq keys"] | None,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        batch, seq, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, seq, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.read(layer, q.dtype)
        # Its softmax is in float32 whatever the dtype of q, which strict promotion
        # would refuse for 16 bits. With a cache, whose slots are not the queries' own,
        # the mask says what is causal.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=cache is None
            )
        return self.o_proj(y.reshape(batch, seq, -1)), cache


class MLP(nnx.Module):
    """The gated feed-forward network, ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self,
        config: LlamaConfig,
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
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def __call__(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to what it reads through a norm."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.input_layernorm = make_norm(config, param_dtype, rngs)
        self.self_attn = Attention(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.post_attention_layernorm = make_norm(config, param_dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Bool[Array, "batch 1 #seq keys"] | None,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Float[Array, "batch seq hidden"], KVCache | None]:
        y = normalize(self.input_layernorm, x)
        y, cache = self.self_attn(y, rope, mask, cache, layer)
        x = x + y
        x = x + self.mlp(normalize(self.post_attention_layernorm, x))
        return x, cache


def make_norm(
    config: LlamaConfig, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    """A norm that computes in float32."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def normalize(
    norm: nnx.RMSNorm, x: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    """Applies a norm and rounds to the dtype of ``x``."""
    return norm(x).astype(x.dtype)
