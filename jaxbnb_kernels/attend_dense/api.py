"""attend_dense: arguments, checks, implementation, and the derivative."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxbnb_kernels import _selection
from jaxbnb_kernels.attend_dense import kernels, xla

IMPLEMENTATIONS = {"cpu": kernels, "xla": xla}


def attend_dense(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes ``softmax(scale * q @ k.T) @ v`` for each head.

    Softmax and sums are in float32, the operands of products in the dtype of ``q``. The
    backward pass computes the scores again, and keeps only the arguments. JAX cannot
    differentiate this in forward mode.

    Args:
        q: queries, in bfloat16 or float32.
        k: keys, in the dtype of ``q``; groups of query heads share a head of keys.
        v: values, in the dtype of ``q``.
        mask: which keys each query sees, boolean. The result of a query that sees no
            key is finite, and otherwise unspecified.
        scale: factor of the scores.
        implementation: "xla", "cpu" (a native kernel, for bfloat16), or None to choose:
            the kernel where it serves the call.

    Returns:
        The attended values, in the dtype of ``q``.

    Raises:
        ValueError: the shapes do not agree.
        TypeError: the dtypes are others.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> q = k = jnp.zeros((1, 2, 1, 4), jnp.bfloat16)
        >>> v = jnp.arange(8, dtype=jnp.bfloat16).reshape(1, 2, 1, 4)
        >>> causal = jnp.tril(jnp.ones((1, 2, 2), bool))
        >>> attend_dense(q, k, v, causal, scale=0.5)[0, :, 0].tolist()
        [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]
    """
    is_known = q.dtype in (jnp.bfloat16, jnp.float32)
    if not (is_known and q.dtype == k.dtype == v.dtype) or mask.dtype != bool:
        raise TypeError(
            "q, k and v must all be bfloat16 or float32, and mask boolean; got "
            f"{q.dtype}, {k.dtype}, {v.dtype} and {mask.dtype}"
        )
    _check_shapes(q.shape, k.shape, v.shape, mask.shape)
    return _attend(float(scale), implementation, q, k, v, mask)


def _check_shapes(q, k, v, mask):
    is_one_dim = len(q) == len(k) == 4 and (q[0], q[3]) == (k[0], k[3])
    if not is_one_dim or k != v or k[2] == 0 or q[2] % k[2]:
        raise ValueError(
            "q must be (batch, queries, heads, head_dim), and k and v (batch, keys, "
            f"kv_heads, head_dim), where kv_heads divides heads; got {q}, {k} and {v}"
        )
    if mask not in ((1, q[1], k[1]), (q[0], q[1], k[1])):
        raise ValueError(
            f"mask must be (1 or {q[0]}, {q[1]}, {k[1]}) for these queries and keys; "
            f"got {mask}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, implementation: str | None, q, k, v, mask):
    functions = {name: module.attend for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "attend_dense", functions, implementation, q, k, v, mask, scale
    )


def _forward(scale, implementation, *arrays):
    return _attend(scale, implementation, *arrays), arrays


def _backward(scale, implementation, arrays, d_out):
    return *_gradient(scale, implementation, *arrays, d_out), None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradient(scale: float, implementation: str | None, q, k, v, mask, d_out):
    functions = {name: module.gradient for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "attend_dense", functions, implementation, q, k, v, mask, d_out, scale
    )


@_gradient.defjvp
def _gradient_jvp(scale, implementation, primals, tangents):
    # Second derivatives are rare: XLA computes them.
    del implementation
    return xla.gradient_jvp(primals, tangents, scale)
