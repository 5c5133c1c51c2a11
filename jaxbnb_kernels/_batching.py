"""Maps functions of one matrix over leading axes that operands may share."""

import functools
from collections.abc import Callable
from typing import Any

import jax


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
