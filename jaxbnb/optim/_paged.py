"""Optimizer state in host memory."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import jax
import jax.core
import optax


def paged(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of ``tx`` in pinned host memory and brings it in for each step.

    Must be the outermost wrapper: ``paged(optax.MultiSteps(tx, 4))``, not the reverse,
    because the branches of a conditional may not differ in where their results live.
    Donate parameters and state together, or the parameters alone. The state of
    parameters that span several devices moves to the host with the first update.

    Args:
        tx: any Optax transformation.

    Returns:
        The same transformation, its state in memory of kind ``pinned_host``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> state = jaxbnb.optim.paged(optax.adam(1e-3)).init(jnp.ones(4))
        >>> state[0].mu.sharding.memory_kind
        'pinned_host'
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> Any:
        state = tx.init(params)
        if _spans_devices(params):
            return state  # Moved now it would be committed to a single device.
        return _move(state, jax.memory.Space.Host)

    def update(updates, state, params=None, **extra_args):
        state = _move(state, jax.memory.Space.Device)
        updates, state = tx.update(updates, state, params, **extra_args)
        return updates, _move(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


_P = ParamSpec("_P")


def paged_form(
    make: Callable[_P, optax.GradientTransformation],
) -> Callable[_P, optax.GradientTransformationExtraArgs]:
    """The function that makes the same optimizer `paged`."""

    @functools.wraps(make)
    def make_paged(*args, **kwargs):
        return paged(make(*args, **kwargs))

    name = make.__name__
    make_paged.__name__ = make_paged.__qualname__ = f"paged_{name}"
    make_paged.__doc__ = f"""`{name}` with its state in host memory; see `paged`.

    Takes the arguments of `{name}`.

    Returns:
        An ``optax.GradientTransformation``, to be used outermost.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> state = jaxbnb.optim.paged_{name}(1e-3).init(jnp.ones((64, 64)))
        >>> {{x.sharding.memory_kind for x in jax.tree.leaves(state)}}
        {{'pinned_host'}}
    """
    return make_paged


def _spans_devices(tree: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    concrete = [x for x in arrays if not isinstance(x, jax.core.Tracer)]
    return any(len(x.sharding.device_set) > 1 for x in concrete)


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)
