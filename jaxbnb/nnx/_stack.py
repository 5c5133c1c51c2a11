"""LayerStack: identical layers with stacked variables, which one scan runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class LayerStack(nnx.Module):
    """``num_layers`` copies of a layer, with their variables stacked on a leading axis.

    Only one layer is compiled, and with ``remat`` the backward pass keeps only each
    layer's input. `jaxbnb.nnx.quantize_model` and `jaxbnb.lora` treat the stack as one
    layer, in which every variable has a leading axis.

    Attributes:
        layer: module in which every variable has shape ``(num_layers, ...)``.
        num_layers: number of layers.
        remat: True to recompute each layer in the backward pass, whatever a call says;
            or a policy of ``jax.checkpoint_policies``, which says what to keep.

    Args:
        make_layer: ``make_layer(rngs)`` makes one layer.
        num_layers: number of layers.
        rngs: random streams, which are split into one for each layer.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> stack = jaxbnb.nnx.LayerStack(
        ...     lambda rngs: nnx.Linear(8, 8, rngs=rngs), 12, rngs=nnx.Rngs(0))
        >>> stack.layer.kernel.shape
        (12, 8, 8)
        >>> stack(lambda layer, x, i: layer(x), jnp.ones((2, 8)), remat=True).shape
        (2, 8)
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        # Variables with named axes get one more axis, without a name, for the layers.
        stack = nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})
        make_layers = nnx.split_rngs(splits=num_layers)(stack)
        self.layer = make_layers(rngs)
        self.num_layers = num_layers
        self.remat: bool | Callable[..., bool] = False

    def __call__(
        self,
        apply: Callable[[nnx.Module, Any, jax.Array], Any],
        carry: Any,
        *,
        remat: bool = False,
    ) -> Any:
        """Runs the layers one after the other.

        Args:
            apply: ``apply(layer, carry, index)`` returns the next carry, where
                ``layer`` has the variables of layer ``index``. Assignments to them are
                dropped, except to each ``nnx.Intermediate`` and to the counts of random
                streams, without which every call would use the same dropout.
            carry: input of the first layer, any pytree.
            remat: whether to recompute each layer in the backward pass instead of
                keeping its intermediate values; by the policy in ``self.remat``, if
                there is one.

        Returns:
            The carry after the last layer.
        """
        graphdef, state = nnx.split(self.layer)
        kept = nnx.Any(nnx.Intermediate, nnx.RngCount)
        if remat or self.remat:
            policy = self.remat if callable(self.remat) else None
            apply = nnx.remat(apply, policy=policy)

        def body(carry, scanned):
            layer_state, index = scanned
            layer = nnx.merge(graphdef, layer_state)
            carry = apply(layer, carry, index)
            return carry, nnx.state(layer, kept)

        indices = jnp.arange(self.num_layers)
        carry, assigned = jax.lax.scan(body, carry, (state, indices))
        nnx.update(self.layer, assigned)
        return carry
