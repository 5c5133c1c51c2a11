"""A table of the state that an optimizer holds for each parameter."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from jaxbnb.core import tree_nbytes
from jaxbnb.core.table import format_table
from jaxbnb.optim.rules import flatten_with_paths


def state_table(tx: optax.GradientTransformation, params: Any) -> str:
    """Which state an optimizer holds for each parameter, as a table to print.

    Nothing is computed or allocated. State belongs to a parameter if it is in a tree
    like the parameters' own. The rest, such as counts, is in the line "other". If the
    parameters are one bare array, its state is every array with as many axes.

    Args:
        tx: any Optax transformation.
        params: arrays, ``jax.ShapeDtypeStruct``, or an ``nnx.State``.

    Returns:
        A line for each parameter: path, shape, dtype, the dtypes of its state, and its
        bytes, in total and for each element of the parameter.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> params = {"kernel": jnp.ones((64, 1024)), "bias": jnp.ones(1024)}
        >>> print(jaxbnb.optim.state_table(jaxbnb.adamw8bit(1e-3), params))
        parameter  shape       dtype    state            bytes  per element
        bias       (1024,)     float32  float32           8200         8.01
        kernel     (64, 1024)  float32  uint8, float32  133120         2.03
        other                           int32                4
        total                                           141324         2.12
        >>> print(jaxbnb.optim.state_table(optax.sgd(1e-3), params))
        parameter  shape       dtype    state  bytes  per element
        bias       (1024,)     float32  -          0         0.00
        kernel     (64, 1024)  float32  -          0         0.00
        total                                      0         0.00
    """
    params = jax.eval_shape(lambda tree: tree, params)
    paths, leaves, treedef = flatten_with_paths(params)
    places = treedef.unflatten(range(len(leaves)))

    def is_params_like(node: Any) -> bool:
        return _beside(node, places) is not None

    held: list[list[Any]] = [[] for _ in leaves]
    other: list[Any] = []
    state = jax.eval_shape(tx.init, params)
    for node in jax.tree.leaves(state, is_leaf=is_params_like):
        pairs = _beside(node, places)
        # Every array is a tree like a bare array.
        if pairs is None or (node is pairs[0][0] and node.ndim != leaves[0].ndim):
            other.append(node)
            continue
        for leaf, place in pairs:
            held[place].append(leaf)
    rows = [("parameter", "shape", "dtype", "state", "bytes", "per element")]
    for path, leaf, mine in zip(paths, leaves, held, strict=True):
        columns = (path, str(leaf.shape), str(leaf.dtype), _dtypes(mine) or "-")
        rows.append((*columns, *_bytes(mine, leaf.size)))
    if other:
        rows.append(("other", "", "", _dtypes(other), *_bytes(other, 0)))
    elements = sum(leaf.size for leaf in leaves)
    rows.append(("total", "", "", "", *_bytes((held, other), elements)))
    return format_table(rows, num_right=2)


def _beside(node: Any, places: Any) -> list[tuple[Any, int]] | None:
    """The arrays of a piece of state, each with the place of its parameter.

    Args:
        node: piece of state. `optax.MaskedNode` may stand for any part of the
            parameters.
        places: the parameters' tree with their places in it.

    Returns:
        None if ``node`` is another tree, or has no array.
    """
    states, structure = jax.tree.flatten(node, is_leaf=_is_masked)
    try:
        beside = structure.flatten_up_to(places)
    except (TypeError, ValueError):
        return None
    pairs = [(s, p) for s, p in zip(states, beside, strict=True) if not _is_masked(s)]
    return pairs if pairs and all(isinstance(p, int) for _, p in pairs) else None


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _dtypes(leaves: Sequence[Any]) -> str:
    """Each dtype once, without those of arrays that have no elements."""
    return ", ".join(dict.fromkeys(str(leaf.dtype) for leaf in leaves if leaf.size))


def _bytes(tree: Any, elements: int) -> tuple[str, str]:
    total = tree_nbytes(tree)
    return str(total), f"{total / elements:.2f}" if elements else ""
