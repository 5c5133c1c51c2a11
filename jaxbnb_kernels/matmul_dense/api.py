"""matmul_dense: arguments, checks, implementation, and the derivative."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import custom_vjp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_dense import kernels, xla

IMPLEMENTATIONS = {"cpu": kernels, "xla": xla}


def matmul_dense(
    x: Float[Array, "*batch k"],
    weight: Float[Array, "rows size"],
    *,
    transpose: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Computes ``x @ weight``, or ``x @ weight.T`` if ``transpose``.

    Both are multiplied in the dtype of ``weight`` and accumulated in float32, in the
    backward pass as well. That keeps ``x`` only if ``weight`` is differentiated.

    Args:
        x: ``(*batch, k)``; k is the number of rows, or ``size`` if ``transpose``.
        weight: the matrix, in the dtype of ``x``, or in one of 16 bits if ``x`` is
            float32.
        transpose: whether to contract with the last axis of ``weight``.
        implementation: "xla", "cpu" (a native kernel, for bfloat16), or None to choose:
            the kernel where it serves the call.

    Returns:
        ``(*batch, n)`` in the dtype of ``x``.

    Raises:
        ValueError: the sizes do not agree.
        TypeError: the dtypes are others.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> weight = jnp.array([[1, 2], [3, 4]], jnp.bfloat16)
        >>> matmul_dense(jnp.array([1, 1], jnp.bfloat16), weight).tolist()
        [4.0, 6.0]
    """
    is_floating = jnp.issubdtype(weight.dtype, jnp.floating)
    if x.dtype not in (weight.dtype, jnp.float32) or not is_floating:
        raise TypeError(
            "x must be float32 or have the dtype of weight, which is floating; got "
            f"{x.dtype} and {weight.dtype}"
        )
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix; got shape {weight.shape}")
    k = weight.shape[1 if transpose else 0]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"the last axis of x must be {k} to multiply; got {x.shape}")
    return _matmul(transpose, implementation, x, weight)


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def _matmul(transpose: bool, implementation: str | None, x: Array, weight: Array):
    functions = {name: module.matmul for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "matmul_dense", functions, implementation, x, weight, transpose
    )


def _forward(transpose, implementation, x, weight):
    y = _matmul(transpose, implementation, x.value, weight.value)
    # None of x is needed for a frozen matrix.
    kept = x.value if weight.perturbed else None
    return y, (kept, weight.value)


def _backward(transpose, implementation, residuals, dy):
    x, weight = residuals
    if isinstance(dy, SymbolicZero):
        aval: Any = dy.aval
        dy = jnp.zeros(aval.shape, aval.dtype)
    dx = _matmul(not transpose, implementation, dy, weight)
    if x is None:
        return dx, None
    return dx, xla.weight_gradient(x, dy, transpose, weight.dtype)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
