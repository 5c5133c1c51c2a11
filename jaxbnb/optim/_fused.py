"""A whole step of an optimizer at once."""

import functools
from collections.abc import Callable
from typing import Any

import optax


def fused_step(
    tx: optax.GradientTransformation,
) -> Callable[[optax.Updates, Any, optax.Params], tuple[optax.Params, Any]]:
    """A whole step of an optimizer: parameters and state in, the new ones out.

    Computes what ``tx.update`` and ``optax.apply_updates`` do. For the elementwise
    8-bit optimizers of jaxbnb (`adamw8bit`, `lion8bit`, ...), as they are or `paged`
    and not inside a chain, it is one pass over each parameter that writes no updates to
    memory: with parameters and state donated it needs next to no temporary. The step of
    a 16-bit parameter is then computed in float32 and rounded once. For any other
    transformation it is those two calls.

    Args:
        tx: any Optax transformation.

    Returns:
        ``step(grads, state, params) -> (params, state)``, for use inside ``jax.jit``.

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
    owner = getattr(tx.update, "__self__", None)
    step = getattr(owner, "fused_step", None)
    return step or functools.partial(update_and_apply, tx)


def update_and_apply(tx, grads, state, params):
    """``(params, state)`` by way of updates, of any transformation."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
