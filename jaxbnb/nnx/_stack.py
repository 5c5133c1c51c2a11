"""LayerStack: identical layers with stacked variables, run by one scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class LayerStack(nnx.Module):
    """``num_layers`` copies of a layer, their variables stacked on a leading axis.

    One layer is compiled however many there are, and with ``remat`` the backward pass
    keeps only each layer's input. `jaxbnb.nnx.quantize_model` and `jaxbnb.lora` treat
    the stack as the one layer that it is, every variable with its leading axis.

    Attributes:
        layer: one module whose every variable has shape ``(num_layers, ...)``.
        num_layers: how many.
        remat: True to recompute each layer in the backward pass whatever a call says,
            or a policy of ``jax.checkpoint_policies``, which says what of it is kept.

    Args:
        make_layer: ``make_layer(rngs)`` makes one layer.
        num_layers: how many.
        rngs: split into one stream a layer.

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
        # Variables with named axes get one more, without a name, for the layers.
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
            apply: ``apply(layer, carry, index)`` gives the next carry; ``layer`` has
                the variables of layer ``index``, and what it assigns to them is
                dropped, but for each ``nnx.Intermediate`` and the counts of its random
                streams, without which each call would drop out the same.
            carry: what flows through the layers, any pytree.
            remat: recompute each layer in the backward pass instead of keeping its
                intermediate values; by the policy of ``self.remat``, if it is one.

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
