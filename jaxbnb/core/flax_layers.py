"""What Linen's and NNX's layers have in common."""

from typing import Any

import jax
import jax.numpy as jnp


def refuse_custom_product(layer: Any) -> None:
    """Raises NotImplementedError for a layer that has a custom product.

    Args:
        layer: Linen or NNX layer.

    Example:
        >>> import flax.linen as nn
        >>> refuse_custom_product(nn.Dense(4))
    """
    defaults = (None, jax.lax.dot_general, jnp.einsum)
    for name in ("dot_general", "dot_general_cls", "einsum_op"):
        if not any(getattr(layer, name, None) is default for default in defaults):
            raise NotImplementedError(
                f"{type(layer).__name__} has a {name} of its own, which a quantised "
                "layer would not call; leave the layer as it is, with a rule that has "
                "None as its format"
            )
