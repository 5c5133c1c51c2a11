"""The product as XLA computes it: the specification, and the path on any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(
    x: Float[Array, "*batch k"], weight: Float[Array, "rows size"], transpose: bool
) -> Float[Array, "*batch n"]:
    """See `matmul_dense`."""
    summed = ((x.ndim - 1,), (1 if transpose else 0,))
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (summed, ((), ())),
        preferred_element_type=x.dtype,
    )


def weight_gradient(
    x: Float[Array, "*batch k"],
    dy: Float[Array, "*batch n"],
    transpose: bool,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "rows size"]:
    """Computes the cotangent of the matrix, in its dtype."""
    x, dy = (a.reshape(-1, a.shape[-1]).astype(dtype) for a in (x, dy))
    # XLA on a CPU may transpose the left operand in memory, so the smaller one is left.
    if x.size < dy.size:
        gradient, is_transposed = jnp.matmul(x.T, dy), transpose
    else:
        gradient, is_transposed = jnp.matmul(dy.T, x), not transpose
    return gradient.T if is_transposed else gradient
