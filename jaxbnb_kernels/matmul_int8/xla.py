"""The same, at the cost of the outliers there are: their columns are gathered.

Without outliers that is the product of integers and a glance at x. With them, it is a
product as wide as they are many, in steps of 128 columns. Static shapes leave no other
choice but to bound their number, or to multiply all columns twice.
"""

import math
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from jaxbnb_kernels.matmul_int8 import reference

# Columns of outliers multiplied at a time: the width at which matrix units are full.
_STEP: Final = 128


def matmul(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_int8`."""
    quantized = reference.quantize_inliers(x, outlier_threshold)
    return multiply(x, *quantized, codes, col_scale, outlier_threshold, compute_dtype)


def multiply(
    x: Float[Array, "*batch k"],
    x_codes: Int8[Array, "*batch k"],
    row_scale: Float32[Array, "*batch"],
    columns: Bool[Array, "k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """The same, of rows that have been quantised."""
    y = reference.rescale(int_dot(x_codes, codes), row_scale, col_scale)
    if outlier_threshold and x.shape[-1]:
        y = _add_outliers(y, x, codes, col_scale, columns, compute_dtype)
    return y.astype(x.dtype)


def _add_outliers(
    y: Float32[Array, "*batch n"],
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    columns: Bool[Array, "k"],
    compute_dtype: np.dtype,
) -> Float32[Array, "*batch n"]:
    """Y plus the product over the outlier columns."""
    k = x.shape[-1]
    step = min(_STEP, k)
    (order,) = jnp.nonzero(columns, size=-(-k // step) * step, fill_value=k)

    def add(carry):
        first, y = carry
        chosen = jax.lax.dynamic_slice(order, (first,), (step,))
        # Past the last outlier, x has zeros; any column of the matrix will do then.
        outliers = jnp.take(x, chosen, axis=-1, mode="fill", fill_value=0)
        taken = jnp.take(codes, chosen, axis=1, mode="clip")
        # Transposed, as a gather of columns lies in memory: XLA on a CPU refuses the
        # product of bfloat16 that it makes of the other order.
        matrix = reference.decode(taken, col_scale, compute_dtype).T
        part = reference.dot(outliers.astype(compute_dtype), matrix, 0)
        return first + step, y + part

    count = jnp.sum(columns)
    _, y = jax.lax.while_loop(lambda carry: carry[0] < count, add, (0, y))
    return y


def int_dot(
    x_codes: Int8[Array, "*batch k"], codes: Int8[Array, "n k"]
) -> Int32[Array, "*batch n"]:
    """The product of integers, of one matrix with another.

    XLA on a CPU multiplies int8 matrices by the instructions for it, but a single row
    element by element: 70 ms instead of 1.1 ms for one of 4096 x 4096. So that has a
    row of zeros added.
    """
    *batch, k = x_codes.shape
    rows = x_codes.reshape(math.prod(batch), k)
    if len(rows) == 1:
        rows = jnp.pad(rows, [(0, 1), (0, 0)])
    sums = reference.int_dot(rows, codes)
    return sums[: math.prod(batch)].reshape(*batch, len(codes))
