"""LoraAdapter: the trainable factors of one adapter of one layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.core.contraction import Product
from jaxbnb.lora import _init
from jaxbnb.lora._base import Base, get_bias, get_weight, spread_bias
from jaxbnb.lora._config import LoraConfig
from jaxbnb.nnx import keep_product
from jaxbnb_kernels.matmul_dense import matmul_dense


class LoraScale(nnx.Variable[jax.Array]):
    """The factor of an update: one number per layer, not trained."""


class LoraAdapter(nnx.Module):
    """An adapter of a linear layer or an embedding, or of a stack of linear layers.

    It treats the kernel as matrices ``(*stack, *batch, fan_in, fan_out)``. The axes
    that the product sums over are flattened to ``fan_in``, and those of the outputs to
    ``fan_out``, in the order of the kernel. ``batch`` is empty unless a layer has
    several kernels, e.g. of experts. Then each kernel has a pair of factors. The kernel
    of an embedding is ``(num_embeddings, features)``.

    Attributes:
        lora_a: ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_in, r)``.
        lora_b: ``nnx.LoRAParam`` of shape ``(*stack, *batch, r, fan_out)``.
        magnitude: DoRA's ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_out)``, or
            None.
        scale: `LoraScale` of shape ``stack``.
        dropout: ``nnx.Dropout``, or None; ``model.train()`` and ``model.eval()`` switch
            it on and off.
        config: the `LoraConfig`.
        ranks: rank of each layer in the stack; 0 for layers without an adapter.
    """

    def __init__(
        self,
        lora_a: Float[Array, "*stack_batch fan_in r"],
        lora_b: Float[Array, "*stack_batch r fan_out"],
        scale: Float32[Array, "*stack"],
        *,
        magnitude: Float32[Array, "*stack_batch fan_out"] | None,
        config: LoraConfig,
        ranks: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scale = LoraScale(scale)
        self.magnitude: nnx.LoRAParam | None = nnx.data(None)
        if magnitude is not None:
            self.magnitude = nnx.LoRAParam(magnitude)
        self.dropout: nnx.Dropout | None = nnx.data(None)
        if config.lora_dropout:
            self.dropout = nnx.Dropout(config.lora_dropout)
            # Each layer of a stack gets a stream, which is scanned over with the rest.
            # Dropout's initializer cannot fork a stream that is split already.
            stream = rngs.dropout.fork()
            self.dropout.rngs = nnx.data(
                stream.split(scale.shape) if scale.ndim else stream
            )
        self.config = config
        self.ranks = ranks

    def update(
        self,
        x: Float[Array, "*inputs"],
        y: Float[Array, "*outputs"],
        base: Base,
        product: Product,
        einsum_str: str | None = None,
    ) -> Float[Array, "*outputs"]:
        """Computes the update that is added to ``y = base(x)``.

        Args:
            x: input, in the dtype of ``y``.
            y: result of the layer.
            base: the layer.
            product: description of how the layer multiplies this input.
            einsum_str: equation that the layer was called with.
        """
        dropped = x if self.dropout is None else self.dropout(x)
        update = product(dropped, self._apply)
        if self.magnitude is None:
            return update
        if self.dropout is not None and not self.dropout.deterministic:
            y = base(dropped, **make_options(einsum_str))
        bias = get_bias(base)
        if bias is not None:
            bias = spread_bias(base, bias[...], product, einsum_str)
            y = y - bias.astype(y.dtype)
        factor = product.columns(self._compute_factor(get_weight(base)))
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * update

    @property
    def is_linear(self) -> bool:
        """Whether the update is ``scale * x A B`` now, without dropout or DoRA."""
        is_dropped = self.dropout is not None and not self.dropout.deterministic
        return self.magnitude is None and not is_dropped

    def update_groups(
        self, x: Float[Array, "m fan_in"], sizes: Int[Array, " groups"]
    ) -> Float[Array, "m fan_out"]:
        """Computes the update of rows, sorted by the layer of the stack that they use.

        Args:
            x: input, in the dtype of the result.
            sizes: number of rows of each layer.
        """
        a, b = (factor[...].astype(x.dtype) for factor in (self.lora_a, self.lora_b))
        inner = jax.lax.ragged_dot(x, a, sizes).astype(jnp.float32)
        scale = jnp.repeat(self.scale[...], sizes, total_repeat_length=len(x))
        return jax.lax.ragged_dot((scale[:, None] * inner).astype(x.dtype), b, sizes)

    def look_up(
        self,
        ids: Int[Array, "*batch"],
        y: Float[Array, "*batch features"],
        base: Base,
    ) -> Float[Array, "*batch features"]:
        """Computes the update that is added to the rows ``y`` of an embedding.

        As in PEFT, there is no dropout.
        """
        a, b = self.lora_a[...], self.lora_b[...]
        inner = self.scale[...] * jnp.take(a, ids, axis=0)
        update = inner.astype(y.dtype) @ b.astype(y.dtype)
        if self.magnitude is None:
            return update
        factor = self._compute_factor(get_weight(base))
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * update

    def _apply(
        self, rows: Float[Array, "*rows fan_in"]
    ) -> Float[Array, "*rows fan_out"]:
        """Multiplies rows by ``scale * A B``."""
        a, b = self.lora_a[...], self.lora_b[...]
        multiply = matmul_dense
        for _ in range(a.ndim - 2):
            multiply = jax.vmap(multiply)
        inner = keep_product(multiply(rows, a.astype(rows.dtype)))
        # The scale is applied in float32, so that it is not rounded on its own, and
        # between the factors, where there are only r columns.
        inner = (self.scale[...] * inner.astype(jnp.float32)).astype(rows.dtype)
        return multiply(inner, b.astype(rows.dtype))

    def change(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        """Computes what the adapter adds to the weight, in effect, without dropout."""
        product = self._multiply_factors()
        if self.magnitude is None:
            return product
        factor = self._compute_factor(weight)[..., None, :]
        return (factor - 1) * weight + factor * product

    def _multiply_factors(self) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        a, b = self.lora_a[...], self.lora_b[...]
        return _init.multiply_factors(a, b, self.scale[...])

    def _compute_factor(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_out"]:
        """Computes DoRA's magnitude over the norm; the norm does not get a gradient."""
        assert self.magnitude is not None
        norm = jax.lax.stop_gradient(
            _init.compute_column_norms(weight + self._multiply_factors())
        )
        # A column of zeros does not have a direction to scale.
        norm = jnp.where(norm > 0, norm, 1.0)
        return self.magnitude[...] / norm


def make_options(einsum_str: str | None) -> dict[str, str]:
    """Returns the arguments of a layer's call; only an einsum takes an equation."""
    return {} if einsum_str is None else {"einsum_str": einsum_str}
