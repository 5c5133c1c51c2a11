"""Which low-bit transformation made which part of a state, however deep in a chain.

An Optax wrapper is a closure, so nobody can ask a chain for its parts. But ``init`` of
a wrapper calls ``init`` of what it wraps: that is traced once, without arrays, and each
low-bit transformation notes the very object that it returns. The note is found again in
the state that comes out.
"""

import contextvars
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a state: what one low-bit transformation made, or one other array.

    Attributes:
        owner: the low-bit transformation, or None.
        params: the shapes of the parameters that it saw; None without an owner.
        shapes: the piece, with a ``jax.ShapeDtypeStruct`` for each array.
    """

    owner: Any
    params: Any
    shapes: Any


# By the state's id its owner, the parameters that this saw, and the state, since the id
# of an object that is gone may come again.
_Notes = dict[int, tuple[Any, Any, Any]]

# Set while `parts_of` traces. What `init` returns does not depend on it.
_notes: contextvars.ContextVar[_Notes | None] = contextvars.ContextVar(
    "jaxbnb_owners", default=None
)


def made(owner: Any, params: Any, state: _State) -> _State:
    """Notes whose state this is; called by ``init`` of low-bit transformations."""
    notes = _notes.get()
    if notes is not None:
        notes[id(state)] = (owner, params, state)
    return state


def parts_of(tx: Any, params: Any) -> Any:
    """The state of ``tx`` as a tree whose leaves are each a `Part`."""
    parts: list[Any] = []

    def trace(params):
        notes: _Notes = {}
        token = _notes.set(notes)
        try:
            state = tx.init(params)
        finally:
            _notes.reset(token)

        def part(node):
            owner, seen, _ = notes.get(id(node), (None, None, None))
            return Part(owner, _shapes(seen), _shapes(node))

        parts.append(jax.tree.map(part, state, is_leaf=lambda node: id(node) in notes))

    jax.eval_shape(trace, params)
    return parts[0]


def _shapes(tree: Any) -> Any:
    def shape(x):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape, tree)
