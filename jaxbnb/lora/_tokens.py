"""TrainedTokens: some rows of an embedding, or of a head, that are trained."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxbnb.core import QuantizedArray
from jaxbnb.core.contraction import Product
from jaxbnb.core.parts import apply_or_eval_shape
from jaxbnb.lora._base import Base, Embedding, get_bias, get_param


class TrainedTokens(nnx.Module):
    """Rows that replace those of some tokens in an embedding, or in an output head.

    ``trainable_token_indices`` of `LoraConfig` makes them.

    Attributes:
        tokens: ``nnx.LoRAParam`` of shape ``(num_tokens, features)``, float32.
        token_indices: id of each token.
        is_head: whether the layer is linear, and each token a column of its kernel.
    """

    def __init__(self, base: Base, token_indices: tuple[int, ...]):
        self.is_head = not isinstance(base, Embedding)
        self.token_indices = token_indices
        ids, is_head = np.asarray(token_indices), self.is_head

        def take(weight: Any) -> Float32[Array, "num_tokens features"]:
            if isinstance(weight, QuantizedArray):
                weight = weight.dequantize()
            rows = weight.T if is_head else weight
            return jnp.take(rows, ids, axis=0).astype(jnp.float32)

        rows = apply_or_eval_shape(take, get_param(base).get_value())
        self.tokens = nnx.LoRAParam(rows)

    def look_up(
        self,
        ids: Int[Array, "*batch"],
        y: Float[Array, "*batch features"],
        base: Base,
    ) -> Float[Array, "*batch features"]:
        """Computes the update that is added to the rows ``y`` of an embedding."""
        place, is_trained = self._find(ids, base)
        rows = self.tokens[...][place].astype(y.dtype)
        return jnp.where(is_trained[..., None], rows - y, jnp.zeros_like(y))

    def _find(
        self, ids: Int[Array, "*batch"], base: Base
    ) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
        """Returns the place of each id among the tokens, and whether it has one."""
        order = np.argsort(self.token_indices)
        sorted_ids = jnp.asarray(np.asarray(self.token_indices)[order], ids.dtype)
        # As in a look-up of rows, a negative id counts from the end.
        ids = jnp.where(ids < 0, ids + get_param(base).shape[0], ids)
        place = jnp.searchsorted(sorted_ids, ids)
        place = jnp.minimum(place, len(order) - 1)
        return jnp.asarray(order)[place], sorted_ids[place] == ids

    def update(
        self,
        x: Float[Array, "*batch features"],
        y: Float[Array, "*batch outputs"],
        base: Base,
        product: Product,
        einsum_str: str | None = None,
    ) -> Float[Array, "*batch outputs"]:
        """Computes the update that is added to ``y = base(x)`` of a linear layer."""
        del product, einsum_str
        bias = get_bias(base)
        new = self.replace_logits(x, y)
        if bias is not None:
            ids = np.asarray(self.token_indices)
            new = new.at[..., ids].add(bias[...][ids].astype(y.dtype))
        return new - y

    def replace_logits(
        self, x: Float[Array, "*batch features"], y: Float[Array, "*batch outputs"]
    ) -> Float[Array, "*batch outputs"]:
        """Replaces the products of ``x`` with the rows of these tokens."""
        logits = jnp.matmul(
            x, self.tokens[...].T.astype(x.dtype), preferred_element_type=y.dtype
        )
        return y.at[..., np.asarray(self.token_indices)].set(logits)

    def change(
        self, weight: Float32[Array, "fan_in fan_out"]
    ) -> Float32[Array, "fan_in fan_out"]:
        """Computes what must be added to the kernel so that it has these rows."""
        ids = np.asarray(self.token_indices)
        if self.is_head:
            new = weight.at[:, ids].set(self.tokens[...].T)
        else:
            new = weight.at[ids].set(self.tokens[...])
        return new - weight
