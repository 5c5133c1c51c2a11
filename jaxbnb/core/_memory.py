"""True bytes of pytrees."""

from typing import Any

import jax


def tree_nbytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree, quantised ones as they are stored.

    Args:
        tree: arrays, ``jax.ShapeDtypeStruct`` or `jaxbnb.QuantizedArray`; also an
            ``nnx.State``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((128, 64)), "nf4")
        >>> jaxbnb.core.tree_nbytes({"kernel": q, "bias": jnp.ones(64)})
        4864
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
