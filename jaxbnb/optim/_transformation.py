"""What our transformations can do beyond Optax's pair of functions.

To Optax, a transformation is the pair of ``init`` and ``update``. Ours also carry the
`Definition` that both are methods of: it can take a whole step at once and describe its
state. Optax's wrappers (``optax.chain``, ``optax.masked``, ...) are closures over the
pair, and hide the definition:

- The fused step is lost. `fused_step` then calls ``update`` and adds the updates.
- The state can still be described. ``init`` of a wrapper calls ``init`` of what it
  wraps. `parts_of` traces that once, without arrays. Each definition notes the very
  object that it returns, and `parts_of` finds it in the state that comes out.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """What a transformation does. Abstract."""

    def init(self, params: optax.Params) -> Any:
        """The state before the first step."""
        raise NotImplementedError

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        """New updates and state."""
        raise NotImplementedError

    def fused_step(
        self, grads: Any, state: Any, params: Any
    ) -> tuple[optax.Params, Any]:
        """New parameters and state."""
        return _update_and_apply(self.update, grads, state, params)

    def conditional_step(
        self, is_taken: jax.Array, grads: Any, state: Any, params: Any
    ) -> tuple[optax.Params, Any]:
        """New parameters and state where ``is_taken``; otherwise those given."""
        return _step_or_stay(self.fused_step, is_taken, grads, state, params)

    def describe_state(self, part: "Part", positions: Any) -> tuple[Any, list[Any]]:
        """How Optax holds the same state in 32 bits.

        Args:
            part: a state of this definition, as it noted it.
            positions: tree like ``part.shapes`` with the position of each array.

        Returns:
            The shapes of Optax's state, and a `Place` for each of its arrays.
        """
        raise NotImplementedError

    def transformation(self) -> "Transformation":
        """The definition for use with Optax."""
        return Transformation(self.init, self.update, self)


class Transformation(optax.GradientTransformationExtraArgs):
    """A transformation of ours: a pair for Optax, with its definition for us.

    Attributes:
        definition: the object that ``init`` and ``update`` are methods of. None in a
            copy that ``_replace`` changed.
    """

    definition: Definition | None = None

    def __new__(cls, init: Any, update: Any, definition: Definition | None = None):
        self = super().__new__(cls, init, update)
        self.definition = definition
        return self


# JAX would otherwise rebuild the pair without its definition.
jax.tree_util.register_pytree_node(
    Transformation,
    lambda tx: (tuple(tx), tx.definition),
    lambda definition, pair: Transformation(pair[0], pair[1], definition),
)


def definition_of(tx: optax.GradientTransformation) -> Definition | None:
    """The definition of a transformation of ours; None for Optax's own and wrappers."""
    return tx.definition if isinstance(tx, Transformation) else None


def fused_step(
    tx: optax.GradientTransformation,
) -> Callable[..., tuple[optax.Params, Any]]:
    """A whole step of an optimizer: parameters and state in, the new ones out.

    Computes what ``tx.update`` and ``optax.apply_updates`` do. For the elementwise
    8-bit optimizers of jaxbnb (`adamw8bit`, `lion8bit`, ...), as they are or `paged`
    and not inside a chain, it is one pass over each parameter that does not write
    updates to memory. With parameters and state donated, it needs next to no temporary
    memory. The step of a 16-bit parameter is then computed in float32 and rounded once.
    For any other transformation, it makes those two calls.

    Args:
        tx: any Optax transformation.

    Returns:
        ``step(grads, state, params) -> (params, state)``, for use inside ``jax.jit``.
        A fourth argument, a boolean scalar, says whether to take the step. If not,
        parameters and state stay as they are, even if gradients are not finite.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.adamw8bit(1e-2)
        >>> step = jax.jit(jaxbnb.optim.fused_step(tx), donate_argnums=(1, 2))
        >>> params = {"kernel": jnp.ones((64, 64))}
        >>> state = tx.init(params)
        >>> params, state = step({"kernel": jnp.ones((64, 64))}, state, params)
        >>> round(float(params["kernel"][0, 0]), 4)
        0.99
    """
    definition = definition_of(tx)
    if definition is None:
        take = functools.partial(_update_and_apply, tx.update)
        take_if = functools.partial(_step_or_stay, take)
    else:
        take, take_if = definition.fused_step, definition.conditional_step

    def step(grads, state, params, is_taken=None):
        if is_taken is None:
            return take(grads, state, params)
        return take_if(is_taken, grads, state, params)

    return step


def choose(is_taken: jax.Array, new: Any, old: Any) -> Any:
    """Returns the arrays of ``new`` where ``is_taken``, and those of ``old`` where not.

    Arrays of the host's memory are compared on the device, and go back.
    """

    def leaf(new, old):
        if not _is_on_host(old):
            return jnp.where(is_taken, new, old)
        new, old = (jax.device_put(x, jax.memory.Space.Device) for x in (new, old))
        return jax.device_put(jnp.where(is_taken, new, old), jax.memory.Space.Host)

    return jax.tree.map(leaf, new, old)


def _step_or_stay(take, is_taken, grads, state, params):
    take = jax.jit(take)  # Traced once for both.

    def select(grads, state, params):
        new_params, new_state = take(grads, state, params)
        return choose(is_taken, new_params, params), choose(is_taken, new_state, state)

    def branch(grads, state, params):
        return jax.lax.cond(
            is_taken,
            take,
            lambda _, state, params: (params, state),
            *(grads, state, params),
        )

    if any(map(_is_on_host, jax.tree.leaves(state))):
        # XLA for GPUs does not compile a conditional that moves arrays to the host.
        return select(grads, state, params)
    # On a CPU, a conditional writes in place, where a selection would need both
    # versions. For a GPU, XLA selects while it writes, and would copy all that a
    # conditional returns: 30 GiB in a step of all parameters of Llama 3 8B.
    return jax.lax.platform_dependent(
        *(grads, state, params), cpu=branch, default=select
    )


def _is_on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _update_and_apply(update, grads, state, params):
    updates, state = update(grads, state, params)
    return optax.apply_updates(params, updates), state


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a state: what one definition returned, or one other array.

    Attributes:
        definition: definition that returned it; None for another array.
        params: shapes of the parameters that the definition saw; None without one.
        shapes: the piece, with a ``jax.ShapeDtypeStruct`` for each array.
    """

    definition: Definition | None
    params: Any
    shapes: Any


# Set while `parts_of` traces. What `init` returns does not depend on it.
_notes: contextvars.ContextVar[list[tuple[Any, Definition, Any]] | None] = (
    contextvars.ContextVar("jaxbnb_notes", default=None)
)


def note(definition: Definition, params: Any, state: _State) -> _State:
    """Notes which definition returns this state from its ``init``."""
    notes = _notes.get()
    if notes is not None:
        notes.append((state, definition, params))
    return state


def parts_of(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state of ``tx`` as a tree of `Part`, however deep ours are wrapped."""
    parts: list[Any] = []

    def trace(params):
        notes = []
        token = _notes.set(notes)
        try:
            state = tx.init(params)
        finally:
            _notes.reset(token)

        def find(node):
            return next((note for note in notes if note[0] is node), None)

        def part(node):
            _, definition, seen = find(node) or (None, None, None)
            return Part(definition, _shapes(seen), _shapes(node))

        is_noted = lambda node: find(node) is not None  # noqa: E731
        parts.append(jax.tree.map(part, state, is_leaf=is_noted))

    jax.eval_shape(trace, params)
    return parts[0]


def _shapes(tree: Any) -> Any:
    def shape(x):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape, tree)
