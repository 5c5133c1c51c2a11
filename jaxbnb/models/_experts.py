"""Experts: several MLPs in a layer, a few of them used by each token."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

import jaxbnb_kernels
from jaxbnb.core.grouped import grouped_matmul
from jaxbnb.lora import LoraLinear
from jaxbnb.models._config import DecoderConfig
from jaxbnb.nnx import LayerStack, QuantLinear
from jaxbnb.sharding.activations import shares_experts, sum_experts
from jaxbnb_kernels.grouped_matmul_blockwise import MOST_ROWS


class Experts(nnx.Module):
    """A weighted sum of the experts that the router ranks highest for each token.

    The experts are a `jaxbnb.nnx.LayerStack`. Their kernels ``(experts, in, out)`` are
    quantised and adapted like those of any other linear layer.

    The experts run one after the other, each on all tokens, or not at all if no token
    uses it. This is exact, has static shapes, and decodes the kernels of only one
    expert at a time; generating a single row reads only the experts that the token
    uses. (Sorting tokens by expert for ``jax.lax.ragged_dot`` would decode all experts
    at once. With 8 experts and 512 tokens, that takes XLA 5 times as long on a CPU, and
    6 times the memory.)

    On a mesh with an axis "expert", each device runs its own experts, and the results
    are summed up. Dropout in them is then the same in each call.

    On a GPU, a few tokens are sorted by expert instead. Then each linear layer is one
    `jaxbnb.core.grouped.grouped_matmul`, with one launch for all experts.

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
        weights, chosen = self.gate(x)
        if not self._may_group(chosen.size):
            return self._one_by_one(x, weights, chosen)
        return jax.lax.platform_dependent(
            x, weights, chosen, cuda=self._grouped, default=self._one_by_one
        )

    def _may_group(self, num_rows: int) -> bool:
        """Whether there is a grouped product for all layers, and it may pay."""
        layers = [module for _, module in nnx.iter_children(self.experts.layer)]
        return (
            num_rows <= MOST_ROWS * self.experts.num_layers
            and jaxbnb_kernels.config.mosaic_gpu != "never"
            and all(map(_is_groupable, layers))
        )

    def _grouped(
        self,
        x: Float[Array, "batch seq hidden"],
        weights: Float32[Array, "batch seq chosen"],
        chosen: Int32[Array, "batch seq chosen"],
    ) -> Float[Array, "batch seq hidden"]:
        """Sorts tokens by expert, once for each expert that they use."""
        count = chosen.shape[-1]
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts.num_layers)

        rows = x.reshape(-1, x.shape[-1])[order // count]
        project = functools.partial(_apply_groups, sizes=sizes)
        y = self.experts.layer(rows, project)[jnp.argsort(order)]
        y = y.reshape(*chosen.shape, x.shape[-1]).astype(jnp.float32)
        return jnp.sum(weights[..., None] * y, axis=-2).astype(x.dtype)

    def _one_by_one(
        self,
        x: Float[Array, "batch seq hidden"],
        weights: Float32[Array, "batch seq chosen"],
        chosen: Int32[Array, "batch seq chosen"],
    ) -> Float[Array, "batch seq hidden"]:
        is_chosen = jax.nn.one_hot(chosen, self.experts.num_layers, dtype=jnp.float32)
        of_experts = jnp.sum(weights[..., None] * is_chosen, axis=-2)

        if not shares_experts(self.experts.num_layers):
            return _add_experts(self.experts, x, of_experts).astype(x.dtype)
        graphdef, state = nnx.split(self.experts)

        def add_part(state, of_experts, x):
            experts = nnx.merge(graphdef, state)
            experts.num_layers = of_experts.shape[0]
            return _add_experts(experts, x, jnp.moveaxis(of_experts, 0, -1))

        of_experts = jnp.moveaxis(of_experts, -1, 0)
        total = sum_experts(add_part, (state, of_experts), x)
        return total.astype(x.dtype)


def _add_experts(
    experts: LayerStack,
    x: Float[Array, "batch seq hidden"],
    of_experts: Float32[Array, "batch seq experts"],
) -> Float32[Array, "batch seq hidden"]:
    """Adds up what experts make of tokens, times their weights."""

    def apply(expert, total, index):
        weight = of_experts[..., index, None]

        def add(expert, total):
            return total + weight * expert(x).astype(jnp.float32)

        # nnx.cond, because layers of the expert may store an nnx.Intermediate.
        is_taken = jnp.any(weight > 0)
        return nnx.cond(is_taken, add, lambda _, total: total, expert, total)

    return experts(apply, jnp.zeros(x.shape, jnp.float32))


class Router(nnx.Module):
    """Chooses the experts of each token, and their weights.

    Its kernel is small and decides between experts. It is not an ``nnx.Linear``, so
    that it is not quantised.

    Attributes:
        kernel: ``(hidden, experts)``.
        bias: ``(experts,)``, if the family has it.
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
        if config.router_bias:
            self.bias = nnx.Param(jnp.zeros(config.num_experts, param_dtype))
        self.num_experts_per_tok = config.num_experts_per_tok

    def __call__(
        self, x: Float[Array, "batch seq hidden"]
    ) -> tuple[
        Float32[Array, "batch seq chosen"],
        Int32[Array, "batch seq chosen"],
    ]:
        """Returns the weights of the likeliest experts, and their numbers."""
        kernel = self.kernel[...].astype(x.dtype)
        logits = jnp.matmul(x, kernel).astype(jnp.float32)
        if hasattr(self, "bias"):
            logits = logits + self.bias[...].astype(jnp.float32)
        p = jax.nn.softmax(logits)
        best, experts = jax.lax.top_k(p, self.num_experts_per_tok)
        return best / jnp.sum(best, axis=-1, keepdims=True), experts


def _is_groupable(layer: nnx.Module) -> bool:
    """Whether `_apply_groups` can apply a layer to tokens sorted by expert.

    A derived class may do more than multiply, e.g. record its input.
    """
    if type(layer) is LoraLinear:
        return layer.is_sum and _is_groupable(layer.base)
    if type(layer) is not QuantLinear:
        return False
    config = layer.config
    return config.quant_type != "llm_int8" and config.act_quant_type is None


def _apply_groups(
    layer: Any,
    x: Float[Array, "m fan_in"],
    *,
    sizes: Int[Array, " experts"],
) -> Float[Array, "m fan_out"]:
    """Applies a stack of groupable layers to rows that are sorted by layer."""
    if isinstance(layer, LoraLinear):
        y = _apply_groups(layer.base, x, sizes=sizes)
        return y + layer.update_groups(x.astype(y.dtype), sizes)
    x = x if layer.dtype is None else x.astype(layer.dtype)
    y = grouped_matmul(
        x, sizes, layer.kernel[...], compute_dtype=layer.config.compute_dtype
    )
    if layer.bias is None:
        return y
    bias = layer.bias[...].astype(y.dtype)
    return y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(y))
