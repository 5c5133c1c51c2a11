"""tree_nbytes: the bytes that a pytree holds."""

import math
from typing import Any

import jax


def tree_nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays in a pytree; quantised ones count as stored.

    Args:
        tree: pytree of arrays, ``jax.ShapeDtypeStruct`` or `jaxbnb.QuantizedArray`, or
            an ``nnx.State``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((128, 64)), "nf4")
        >>> jaxbnb.core.tree_nbytes({"kernel": q, "bias": jnp.ones(64)})
        4864
    """
    # The leaves that NNX prints a model with have a shape and a dtype, but no size.
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
