"""The product as XLA computes it: the specification, and the path on any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(
    x: Float[Array, "*batch k"], weight: Float[Array, "rows size"], transpose: bool
) -> Float[Array, "*batch n"]:
    """See `matmul_dense`."""
    axis = 1 if transpose else 0
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=x.dtype
    )


def weight_gradient(
    x: Float[Array, "*batch k"], dy: Float[Array, "*batch n"], transpose: bool
) -> Float[Array, "rows size"]:
    """Computes the cotangent of the matrix."""
    x, dy = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    return jnp.matmul(dy.T, x) if transpose else jnp.matmul(x.T, dy)
