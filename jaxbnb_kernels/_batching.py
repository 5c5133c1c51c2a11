"""Maps functions of one matrix over leading axes that operands may share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def over_leading_axes(
    function: Callable[..., Any], count: int, *arrays: jax.Array
) -> Any:
    """Maps ``function`` over ``count`` leading axes.

    Args:
        function: function of arrays without these axes.
        count: number of leading axes of each array.
        *arrays: arguments. An array that is the same along an axis has size one there.
    """
    if not count:
        return function(*arrays)
    is_shared = [len(a) == 1 for a in arrays]
    if all(is_shared):
        is_shared = [False] * len(arrays)
    axes = tuple(None if shared else 0 for shared in is_shared)
    arrays = tuple(
        a[0] if shared else a for a, shared in zip(arrays, is_shared, strict=True)
    )
    inner = functools.partial(over_leading_axes, function, count - 1)
    return jax.vmap(inner, axes)(*arrays)


def one_after_another(
    function: Callable[..., Any], count: int, *arrays: jax.Array
) -> Any:
    """Like `over_leading_axes`, for functions that JAX cannot map: a loop of calls."""
    if not count:
        return function(*arrays)

    def call(index):
        chosen = [a[0] if len(a) == 1 else a[index] for a in arrays]
        return one_after_another(function, count - 1, *chosen)

    return jax.lax.map(call, jnp.arange(max(map(len, arrays))))


def as_one_stack(
    multiply: Callable[..., jax.Array], x: jax.Array, *weight: jax.Array
) -> jax.Array:
    """Calls a product of a stack of matrices for any number of leading axes.

    Args:
        multiply: function of arrays with one leading axis, of the same size, that
            returns ``(stack, m, n)``.
        x: array ``(*leading, m, k)``. A leading axis has size one in arrays that are
            the same along it.
        *weight: arrays of the matrices, with two axes after the leading ones.

    Returns:
        The product ``(*leading, m, n)``.
    """
    for axis in range(x.ndim - 2):
        if all(a.shape[axis] == 1 for a in weight):
            # The matrix is the same along this axis: put the rows of x side by side.
            together = jnp.moveaxis(x, axis, -3)
            count = math.prod(together.shape[-3:-1])
            rows = together.reshape(*together.shape[:-3], count, x.shape[-1])
            one_fewer = [jnp.squeeze(a, axis) for a in weight]
            product = as_one_stack(multiply, rows, *one_fewer)
            product = product.reshape(*together.shape[:-1], product.shape[-1])
            return jnp.moveaxis(product, -3, axis)
    arrays = x, *weight
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in arrays))
    stacks = [
        jnp.broadcast_to(a, leading + a.shape[-2:]).reshape(
            math.prod(leading), *a.shape[-2:]
        )
        for a in arrays
    ]
    product = multiply(*stacks)
    return product.reshape(*leading, *product.shape[1:])
