"""Experts: a layer's MLPs of which each token takes some."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.models._config import DecoderConfig
from jaxbnb.nnx import LayerStack


class Experts(nnx.Module):
    """A weighted sum of the experts that the router likes best, token by token.

    The experts are a `jaxbnb.nnx.LayerStack`: kernels ``(experts, in, out)``, which are
    quantised and adapted like any other linear layer's. They run one after the other,
    each on all tokens or, where no token takes it, not at all: exact, with static
    shapes, no more than one expert's kernels decoded at a time; and in decoding a
    single row, reading no more experts than it takes. (Tokens sorted by expert and
    ``jax.lax.ragged_dot`` would have all experts decoded at once; with 8 experts and
    512 tokens XLA takes 5 times as long for it on a CPU, and 6 times the memory.)

    Attributes:
        gate: the `Router`.
        experts: the MLPs.
    """

    def __init__(
        self,
        config: DecoderConfig,
        make_mlp: Callable[[nnx.Rngs], nnx.Module],
        *,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.gate = Router(config, param_dtype=param_dtype, rngs=rngs)
        self.experts = LayerStack(make_mlp, config.num_experts, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        weights = self.gate(x)

        def apply(expert, total, index):
            weight = weights[..., index, None]

            def add(expert, total):
                return total + weight * expert(x).astype(jnp.float32)

            # Of NNX, for what the expert's layers may keep as nnx.Intermediate.
            is_taken = jnp.any(weight > 0)
            return nnx.cond(is_taken, add, lambda _, total: total, expert, total)

        total = self.experts(apply, jnp.zeros(x.shape, jnp.float32))
        return total.astype(x.dtype)


class Router(nnx.Module):
    """Which experts a token takes, and how much of each.

    Its kernel is small and decides between experts, so it is no ``nnx.Linear``, which
    would be quantised.

    Attributes:
        kernel: ``(hidden, experts)``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (config.hidden_size, config.num_experts)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.num_experts_per_tok = config.num_experts_per_tok

    def __call__(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float32[Array, "batch seq experts"]:
        """Weights of sum 1, zero but for the likeliest experts."""
        kernel = self.kernel[...].astype(x.dtype)
        p = jax.nn.softmax(jnp.matmul(x, kernel).astype(jnp.float32))
        best, experts = jax.lax.top_k(p, self.num_experts_per_tok)
        best = best / jnp.sum(best, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(experts, p.shape[-1], dtype=jnp.float32)
        return jnp.sum(best[..., None] * chosen, axis=-2)
