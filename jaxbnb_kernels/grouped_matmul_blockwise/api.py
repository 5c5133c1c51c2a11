"""grouped_matmul_blockwise: arguments, checks, implementation, and the derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels import _selection
from jaxbnb_kernels.grouped_matmul_blockwise import kernels, reference, xla
from jaxbnb_kernels.matmul_blockwise import Weight

IMPLEMENTATIONS = {"mosaic_gpu": kernels, "xla": xla, "reference": reference}


def grouped_matmul_blockwise(
    x: Float[Array, "m k"],
    group_sizes: Integer[Array, " groups"],
    weight: Weight,
    *,
    transpose: bool,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "m n"]:
    r"""Multiplies groups of rows with matrices of their own, as tokens with experts.

    .. math::
        y_i = x_i W_{g(i)}, \quad \text{or } x_i W_{g(i)}^T \text{ if transpose},

    where the first ``group_sizes[0]`` rows are in group 0, the next ``group_sizes[1]``
    in group 1, and so on. Matrices of empty groups are not read. The matrices are
    constants, as in `matmul_blockwise`.

    Args:
        x: ``(m, k)``, sorted by group.
        group_sizes: number of rows of each group. Rows after the last group give zeros.
        weight: the matrices: every array has one more axis in front, for the groups.
        transpose: whether to contract with the last axis of a matrix, along which
            blocks run.
        compute_dtype: dtype of the decoded matrix and of ``x`` in the product, which
            accumulates in float32; None for the dtype of ``x``.
        implementation: "xla", "reference", "mosaic_gpu" (kernels for GPUs, for blocks
            of 32, 64, ... 4096), or None to choose.

    Returns:
        ``(m, n)`` in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not agree.
        TypeError: ``x`` or ``compute_dtype`` is not floating, or ``group_sizes`` are
            not integers.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.codebooks import NF4
        >>> from jaxbnb_kernels.matmul_blockwise import Weight
        >>> from jaxbnb_kernels.quantize_blockwise import quantize_blockwise
        >>> codes, absmax = quantize_blockwise(
        ...     jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), NF4, block_size=2)
        >>> w = Weight(codes, absmax, None, NF4, block_size=2, size=2)
        >>> x, sizes = jnp.ones((3, 2)), jnp.array([1, 2])
        >>> grouped_matmul_blockwise(x, sizes, w, transpose=True).tolist()
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"matmul needs a floating x, got {x.dtype}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if weight.codes.ndim != 3 or group_sizes.shape != weight.codes.shape[:1]:
        raise ValueError(
            f"group_sizes {group_sizes.shape} need a stack of as many matrices; got "
            f"codes of shape {weight.codes.shape}"
        )
    k = weight.size if transpose else weight.codes.shape[-2]
    if x.ndim != 2 or x.shape[-1] != k:
        raise ValueError(f"x must have the shape (m, {k}) to multiply; got {x.shape}")
    compute_dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    if not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype must be floating, got {compute_dtype}")
    sizes = group_sizes.astype(jnp.int32)
    return _matmul(transpose, compute_dtype, implementation, x, sizes, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    transpose: bool,
    compute_dtype: np.dtype,
    implementation: str | None,
    x: Float[Array, "m k"],
    group_sizes: Integer[Array, " groups"],
    weight: Weight,
) -> Float[Array, "m n"]:
    functions = {name: module.matmul for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "grouped_matmul_blockwise",
        functions,
        implementation,
        x,
        group_sizes,
        # Only here, because the backward pass keeps the weight as it is stored.
        weight.with_float_scales(),
        transpose,
        compute_dtype,
    )


def _forward(transpose, compute_dtype, implementation, x, group_sizes, weight):
    y = _matmul(transpose, compute_dtype, implementation, x, group_sizes, weight)
    return y, (group_sizes, weight)


def _backward(transpose, compute_dtype, implementation, residuals, dy):
    dx = _matmul(not transpose, compute_dtype, implementation, dy, *residuals)
    return dx, None, None


_matmul.defvjp(_forward, _backward)
