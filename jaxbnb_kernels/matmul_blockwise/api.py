"""matmul_blockwise: arguments, checks, implementation, and the derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_blockwise import kernels, reference, xla
from jaxbnb_kernels.matmul_blockwise.weight import Weight

IMPLEMENTATIONS = {
    "mosaic_gpu": kernels,
    "cpu": kernels,
    "xla": xla,
    "reference": reference,
}


def matmul_blockwise(
    x: Float[Array, "*batch k"],
    weight: Weight,
    *,
    transpose: bool,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Computes ``x @ W``, or ``x @ W.T`` if ``transpose``, for W quantised along rows.

    The matrix is a constant: its cotangent is zero. The backward pass keeps its codes
    and decodes them again, so no floating-point copy outlives the product.

    Args:
        x: ``(*batch, k)``; k is W's number of rows, or its row size if ``transpose``.
        weight: the matrix, ``(rows, size)``.
        transpose: whether to contract with W's last axis, along which blocks run.
        compute_dtype: dtype of the decoded matrix and of ``x`` in the product, which
            accumulates in float32; None for the dtype of ``x``.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu"
            (kernels for GPUs, for blocks of 32, 64, ... 4096), or None to choose.
            "mosaic_gpu" rounds levels, not the decoded matrix, to ``compute_dtype``.

    Returns:
        ``(*batch, n)`` in the dtype of ``x``.

    Raises:
        ValueError: the sizes do not agree.
        TypeError: ``x`` or ``compute_dtype`` is not floating.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.codebooks import NF4
        >>> from jaxbnb_kernels.quantize_blockwise import quantize_blockwise
        >>> codes, absmax = quantize_blockwise(jnp.eye(2), NF4, block_size=2)
        >>> w = Weight(codes, absmax, None, NF4, block_size=2, size=2)
        >>> matmul_blockwise(jnp.array([3., 4.]), w, transpose=True).tolist()
        [3.0, 4.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"matmul needs a floating x, got {x.dtype}")
    k = weight.size if transpose else weight.codes.shape[-2]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"the last axis of x must be {k} to multiply; got {x.shape}")
    compute_dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    if not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype must be floating, got {compute_dtype}")
    return _matmul(transpose, compute_dtype, implementation, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    transpose: bool,
    compute_dtype: np.dtype,
    implementation: str | None,
    x: Float[Array, "*batch k"],
    weight: Weight,
) -> Float[Array, "*batch n"]:
    functions = {name: module.matmul for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "matmul_blockwise",
        functions,
        implementation,
        x,
        # Only here, because the backward pass keeps the weight as it is stored.
        weight.with_float_scales(),
        transpose,
        compute_dtype,
    )


def _forward(transpose, compute_dtype, implementation, x, weight):
    return _matmul(transpose, compute_dtype, implementation, x, weight), weight


def _backward(transpose, compute_dtype, implementation, weight, dy):
    return _matmul(not transpose, compute_dtype, implementation, dy, weight), None


_matmul.defvjp(_forward, _backward)
