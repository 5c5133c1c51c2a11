"""Layers of Flax that compute their product otherwise."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse_own_product(layer: Any) -> None:
    """Raises NotImplementedError for a layer that was given a product of its own.

    Args:
        layer: of either Flax API.

    Example:
        >>> import flax.linen as nn
        >>> refuse_own_product(nn.Dense(4))
    """
    of_flax = (None, jax.lax.dot_general, jnp.einsum)
    for name in ("dot_general", "dot_general_cls", "einsum_op"):
        if not any(getattr(layer, name, None) is known for known in of_flax):
            raise NotImplementedError(
                f"{type(layer).__name__} has a {name} of its own, which a quantised "
                "layer would not call; leave the layer as it is, with a rule whose "
                "format is None"
            )
