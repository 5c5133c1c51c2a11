"""The specification: two masked products over all columns, one of them of integers."""

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from jaxbnb_kernels import blockwise
from jaxbnb_kernels.matmul_blockwise.reference import dot
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise

# What a product of two codes of 1 stands for, divided by the product of their scales.
UNIT: Final = np.float32(1 / 127**2)


def matmul(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_int8`."""
    x_codes, row_scale, columns = quantize_inliers(x, outlier_threshold)
    y = rescale(int_dot(x_codes, codes), row_scale, col_scale)
    if outlier_threshold:
        outliers = jnp.where(columns, x, 0).astype(compute_dtype)
        y = y + dot(outliers, decode(codes, col_scale, compute_dtype), 1)
    return y.astype(x.dtype)


def quantize_rows(
    x: Float[Array, "*batch k"],
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch"]]:
    """See `matmul_int8.quantize_rows`."""
    x = x.astype(jnp.float32)
    scale = blockwise.absmax(x)
    nearer, reciprocal = blockwise.factors(scale)
    # In this order it rounds as bitsandbytes does; 127 times x / scale would not.
    scaled = (x * nearer[..., None]) * (127.0 * reciprocal)[..., None]
    return jnp.round(scaled).astype(jnp.int8), scale


def quantize_inliers(
    x: Float[Array, "*batch k"], outlier_threshold: float
) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch"], Bool[Array, "k"]]:
    """Returns codes and scales of the inliers, and the columns of outliers.

    Codes are zero in those columns. But the smaller values of an outlier column still
    count for the scales, as they do in bitsandbytes.
    """
    is_large = is_outlier(x, outlier_threshold)
    columns = columns_of(is_large)
    x_codes, row_scale = quantize_rows(jnp.where(is_large, 0, x))
    return jnp.where(columns, 0, x_codes), row_scale, columns


def is_outlier(
    x: Float[Array, "*batch k"], outlier_threshold: float
) -> Bool[Array, "*batch k"]:
    """Returns which elements reach the threshold: none if it is 0."""
    if not outlier_threshold:
        return jnp.zeros(x.shape, jnp.bool_)
    return jnp.abs(x.astype(jnp.float32)) >= outlier_threshold


def columns_of(is_large: Bool[Array, "*batch k"]) -> Bool[Array, "k"]:
    """Returns the columns with a large element in any row."""
    return jnp.any(is_large, axis=tuple(range(is_large.ndim - 1)))


def int_dot(
    x_codes: Int8[Array, "*batch k"], codes: Int8[Array, "n k"]
) -> Int32[Array, "*batch n"]:
    """Computes the exact product of x's codes with the transpose of W's."""
    contract = (((x_codes.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x_codes, codes, contract, preferred_element_type=jnp.int32
    )


def rescale(
    sums: Int32[Array, "*batch n"],
    row_scale: Float32[Array, "*batch"],
    col_scale: Float32[Array, "n"],
) -> Float32[Array, "*batch n"]:
    """Turns sums of products of codes into the numbers that they stand for."""
    return sums.astype(jnp.float32) * (row_scale[..., None] * col_scale) * UNIT


def decode(
    codes: Int8[Array, "n k"], col_scale: Float32[Array, "n"], dtype: np.dtype
) -> Float[Array, "n k"]:
    """Decodes the matrix: linear int8 with one block per row."""
    k = codes.shape[1]
    return dequantize_blockwise(
        codes,
        # Without columns, rows do not have any blocks.
        col_scale[:, None] if k else jnp.zeros((codes.shape[0], 0)),
        None,
        block_size=max(2, k + k % 2),
        size=k,
        dtype=dtype,
        implementation="reference",
    )
