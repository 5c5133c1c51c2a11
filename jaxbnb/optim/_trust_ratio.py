"""The trust ratio of LARS and LAMB."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32


def scale_by_trust_ratio(
    trust_coefficient: jax.typing.ArrayLike = 1.0, eps: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformation:
    """Scales each update by the norm of its parameter over its own.

    Computes what ``optax.scale_by_trust_ratio`` does, without its gradient: Optax's
    norms can be differentiated at zero, and read each array several times for that.

    Args:
        trust_coefficient: factor of the ratio.
        eps: number added to the denominator.

    Returns:
        An ``optax.GradientTransformation`` with an empty state.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "a trust ratio compares updates with params; pass them to update"
            )

        def scale(update, param):
            param_norm, update_norm = _norm(param), _norm(update)
            ratio = trust_coefficient * param_norm / (update_norm + eps)
            # A parameter of zeros would never change.
            is_zero = (param_norm == 0) | (update_norm == 0)
            return update * jnp.where(is_zero, 1.0, ratio).astype(update.dtype)

        return jax.tree.map(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _norm(x: Float[Array, "*shape"]) -> Float32[Array, ""]:
    squares = jnp.square(x.astype(jnp.float32))
    # XLA for CPUs divides a sum of rows among threads, but not a sum of everything.
    rows = jnp.sum(squares, axis=-1) if x.ndim else squares
    return jnp.sqrt(jnp.sum(rows))
