"""Experts: several MLPs in a layer, a few of them used by each token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.models._config import DecoderConfig
from jaxbnb.nnx import LayerStack


class Experts(nnx.Module):
    """A weighted sum of the experts that the router ranks highest for each token.

    The experts are a `jaxbnb.nnx.LayerStack`. Their kernels ``(experts, in, out)`` are
    quantised and adapted like those of any other linear layer. The experts run one
    after the other, each on all tokens, or not at all if no token uses it. This is
    exact, has static shapes, and decodes the kernels of only one expert at a time;
    generating a single row reads only the experts that the token uses. (Sorting tokens
    by expert for ``jax.lax.ragged_dot`` would decode all experts at once. With 8
    experts and 512 tokens, that takes XLA 5 times as long on a CPU, and 6 times the
    memory.)

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

            # nnx.cond, because layers of the expert may store an nnx.Intermediate.
            is_taken = jnp.any(weight > 0)
            return nnx.cond(is_taken, add, lambda _, total: total, expert, total)

        total = self.experts(apply, jnp.zeros(x.shape, jnp.float32))
        return total.astype(x.dtype)


class Router(nnx.Module):
    """Chooses the experts of each token, and their weights.

    Its kernel is small and decides between experts. It is not an ``nnx.Linear``, so
    that it is not quantised.

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
        """Returns weights that sum to 1, zero except for the likeliest experts."""
        kernel = self.kernel[...].astype(x.dtype)
        p = jax.nn.softmax(jnp.matmul(x, kernel).astype(jnp.float32))
        best, experts = jax.lax.top_k(p, self.num_experts_per_tok)
        best = best / jnp.sum(best, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(experts, p.shape[-1], dtype=jnp.float32)
        return jnp.sum(best[..., None] * chosen, axis=-2)
