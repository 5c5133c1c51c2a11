"""matmul_int8 and its parts: arguments, checks, implementation, and the derivative."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.matmul_blockwise import kernels as blockwise_kernels
from jaxbnb_kernels.matmul_blockwise import reference as blockwise_reference
from jaxbnb_kernels.matmul_blockwise import xla as blockwise_xla
from jaxbnb_kernels.matmul_int8 import kernels, reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": kernels,
    "cpu": kernels,
    "xla": xla,
    "reference": reference,
}

# What computes dy @ W.
_OF_GRADIENT: Final = {
    "cpu": blockwise_kernels.matmul,
    "xla": blockwise_xla.matmul,
    "reference": blockwise_reference.matmul,
}

# The most products of 127 with 127 that int32 can sum.
_LARGEST_K: Final = (2**31 - 1) // 127**2


def quantize_rows(
    x: Float[Array, "*batch k"],
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch"]]:
    r"""Quantises each row to int8 with one scale, as bitsandbytes does.

    .. math:: s = \max_i |x_i|, \qquad c_i = \mathrm{round}(x_i \cdot (127 \cdot 1 / s))

    Rounds half to even. A row with a non-finite element has a non-finite scale, so it
    never decodes to finite values; a row of zeros has scale 0.

    Args:
        x: float32, bfloat16 or float16 array; computation is in float32.

    Returns:
        ``(codes, scale)``: int8 codes in the shape of ``x``, float32 ``batch``.

    Raises:
        TypeError: ``x`` is not of a floating dtype.
        ValueError: ``x`` is a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, scale = quantize_rows(jnp.array([[0.0, -2.0, 1.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[0, -127, 64]], [2.0])
    """
    _check_floating("quantize_rows", x)
    if x.ndim == 0:
        raise ValueError("quantize_rows needs at least one axis; got a scalar")
    return reference.quantize_rows(x)


def outlier_columns(
    x: Float[Array, "*batch k"], outlier_threshold: float
) -> Bool[Array, "k"]:
    """Finds the columns with a magnitude of ``outlier_threshold`` or more in any row.

    Args:
        x: rows of a floating dtype.
        outlier_threshold: positive number; 0 for no outliers.

    Raises:
        TypeError: ``x`` is not of a floating dtype.
        ValueError: the threshold is negative or not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0, 0.0], [0.0, -6.0, 5.9]])
        >>> outlier_columns(x, 6.0).tolist()
        [False, True, False]
    """
    _check_floating("outlier_columns", x)
    _check_threshold(outlier_threshold)
    return reference.columns_of(reference.is_outlier(x, outlier_threshold))


def matmul_int8(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    *,
    outlier_threshold: float,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    r"""Computes ``x @ W.T`` in int8, except for the outliers in ``x``.

    W is quantised by `quantize_rows`. C are the outlier columns of ``x``
    (`outlier_columns`, over all rows), s and c are the scales and codes of its rows
    without the elements that reach the threshold, and t and w are those of W:

    .. math::
        y_{ij} = \frac{s_i t_j}{127^2} \sum_{l \notin C} c_{il} w_{jl}
            + \sum_{l \in C} x_{il} \, \frac{t_j w_{jl}}{127}

    The first sum adds integers and is exact. The second is a product in
    ``compute_dtype``, summed in float32. Shapes do not depend on the number of
    outliers, and none is left out, however many there are.

    W is a constant: its cotangent is zero. The cotangent of ``x`` is ``dy @ W`` with
    the decoded matrix in ``compute_dtype``, as if ``x`` had not been rounded. The
    backward pass keeps the codes.

    Args:
        x: ``(*batch, k)``.
        codes: ``(n, k)``, int8.
        col_scale: ``(n,)``, scales of W's rows, which are the result's columns.
        outlier_threshold: magnitude that makes a column an outlier, 6.0 in the paper; 0
            to treat all columns alike.
        compute_dtype: dtype of the outliers' product and of the gradient's; None for
            the dtype of ``x``.
        implementation: "mosaic_gpu" (kernels for Hopper GPUs), "cpu" (a native kernel),
            "xla", "reference", or None to choose.

    Returns:
        ``(*batch, n)`` in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not agree, int32 cannot hold the sum of k products, or
            the threshold is negative or not a number.
        TypeError: ``x`` or ``compute_dtype`` is not floating, or ``codes`` are not
            int8.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, scale = quantize_rows(jnp.eye(2))
        >>> x = jnp.array([[100.0, 1.0], [0.0, 2.0]])
        >>> print(matmul_int8(x, codes, scale, outlier_threshold=6.0))
        [[100.   1.]
         [  0.   2.]]
        >>> y = matmul_int8(x, codes, scale, outlier_threshold=0)
        >>> print(f"{y[0, 1]:.2f}")
        0.79

    References:
        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale, 2022.
    """
    _check_floating("matmul_int8", x)
    _check_threshold(outlier_threshold)
    if codes.dtype != jnp.int8:
        raise TypeError(f"matmul_int8 needs codes of int8, got {codes.dtype}")
    if codes.ndim != 2 or col_scale.shape != codes.shape[:1]:
        raise ValueError(
            f"codes (n, k) have col_scale (n,); got {codes.shape} and {col_scale.shape}"
        )
    k = codes.shape[1]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"the last axis of x must be {k} to multiply; got {x.shape}")
    if k > _LARGEST_K:
        raise ValueError(
            f"int32 holds the sum of at most {_LARGEST_K} products; got {k}; "
            "divide the matrix and add the results"
        )
    compute_dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    if not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype must be floating, got {compute_dtype}")
    return _matmul(
        float(outlier_threshold), compute_dtype, implementation, x, codes, col_scale
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    outlier_threshold: float,
    compute_dtype: np.dtype,
    implementation: str | None,
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
) -> Float[Array, "*batch n"]:
    functions = {name: module.matmul for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "matmul_int8",
        functions,
        implementation,
        x,
        codes,
        col_scale,
        outlier_threshold,
        compute_dtype,
    )


def _forward(outlier_threshold, compute_dtype, implementation, x, codes, col_scale):
    y = _matmul(outlier_threshold, compute_dtype, implementation, x, codes, col_scale)
    return y, (codes, col_scale)


def _backward(outlier_threshold, compute_dtype, implementation, residuals, dy):
    codes, col_scale = residuals
    k = codes.shape[1]
    # W is linear int8 with one block per row, or none per empty row.
    absmax = col_scale[:, None][:, :k]
    weight = Weight(codes, absmax, None, None, max(1, -(-k // 64)) * 64, k)
    dx = _selection.run(
        "matmul_int8",
        _OF_GRADIENT,
        "xla" if implementation == "mosaic_gpu" else implementation,
        dy,
        weight,
        False,
        compute_dtype,
    )
    return dx, None, None


_matmul.defvjp(_forward, _backward)


def _check_floating(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} needs a floating x, got {x.dtype}")


def _check_threshold(outlier_threshold: float) -> None:
    if not outlier_threshold >= 0:
        raise ValueError(
            "outlier_threshold must be positive, 6.0 in the paper, or 0 for no "
            f"outliers; got {outlier_threshold!r}"
        )
