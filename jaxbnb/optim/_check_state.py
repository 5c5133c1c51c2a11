"""Whether a state is one of a transformation, and if not, where it differs."""

from typing import Any

import jax
import numpy as np

from jaxbnb.optim.rules import like_boxed


class StateMismatchError(ValueError):
    """A state of another transformation, or of other parameters."""


_NOT_OF_TX = (
    "Was it made by another transformation, with another block_size or "
    "min_quantized_size, or for other parameters? this takes the state that tx has"
)


def check_state(state: Any, want: Any, hint: str = _NOT_OF_TX) -> None:
    """Raises unless structure and shapes are the same.

    Args:
        state: state to check.
        want: tree of ``jax.ShapeDtypeStruct``. Its boxes do not matter if ``state`` has
            none.
        hint: likely cause, for the error.

    Raises:
        StateMismatchError: structure or shapes differ.
    """
    difference = _difference(state, like_boxed(want, state), "")
    if difference is not None:
        raise StateMismatchError(f"the state has {difference}. {hint}")


def _difference(got: Any, want: Any, path: str) -> str | None:
    """The first node or leaf that differs, in words; None if there is none."""
    (got_children, got_node), (children, node) = _one_level(got), _one_level(want)
    where = f"at {path}" if path else "at its top"
    if got_node != node:
        return f"{_kind(got)} {where}, where {_kind(want)} belongs"
    if jax.tree_util.all_leaves([want]):
        if np.shape(got) != want.shape:
            return f"shape {np.shape(got)} {where}, where {want.shape} belongs"
        return None
    for ((key, *_), mine), (_, theirs) in zip(got_children, children, strict=True):
        deeper = path + jax.tree_util.keystr((key,))
        difference = _difference(mine, theirs, deeper)
        if difference is not None:
            return difference
    return None


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """A node's children with their keys, and its own structure."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _kind(node: Any) -> str:
    if jax.tree_util.all_leaves([node]):
        return "an array"
    children, _ = _one_level(node)
    keys = ", ".join(jax.tree_util.keystr(k, simple=True) for k, _ in children)
    return f"{type(node).__name__}({keys})"
