"""cast_floating: changes the dtype of a tree and leaves its codes alone."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.parts import check_parts

Tree = TypeVar("Tree")


def cast_floating(tree: Tree, dtype: jax.typing.DTypeLike) -> Tree:
    """Casts the floating leaves of a tree, but not codes or absmax.

    ``jax.tree.map(lambda x: x.astype(dtype), tree)`` would cast codes, which are
    indices, and absmax, which must stay float32. Here a quantised array keeps both.
    Only the dtype that it decodes to changes, which costs nothing.

    Args:
        tree: parameters, Linen variables, an ``nnx.State`` or any other pytree. It may
            be abstract.
        dtype: floating dtype.

    Returns:
        The same tree; integers, keys and masks are unchanged.

    Raises:
        TypeError: ``dtype`` is not floating, or a quantised array has been cast in
            some other way.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> params = {"kernel": jaxbnb.quantize(jnp.ones((64, 32)), "nf4", axis=-2),
        ...           "bias": jnp.zeros(32), "steps": jnp.array(3)}
        >>> params = jaxbnb.core.cast_floating(params, jnp.bfloat16)
        >>> params["kernel"].dtype, params["kernel"].absmax.dtype
        (dtype(bfloat16), dtype('float32'))
        >>> params["bias"].dtype, params["steps"].dtype
        (dtype(bfloat16), dtype('int32'))
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"cast_floating casts to a floating dtype, got {dtype!r}")
    dtype = np.dtype(dtype)

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):
            check_parts(leaf)
            return dataclasses.replace(leaf, dtype=dtype)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        return leaf.astype(dtype)

    is_leaf = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    return jax.tree.map(cast, tree, is_leaf=is_leaf)
