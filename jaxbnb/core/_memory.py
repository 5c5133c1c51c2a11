"""True bytes of pytrees."""

import math
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
    # Not every leaf has a size: what NNX prints a model by has a shape and a dtype.
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
