"""The specification: a product of the codes of both operands, as float32 numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels import blockwise
from jaxbnb_kernels.matmul_blockwise.reference import dot


def matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    weight_dtype: np.dtype,
    act_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_fp8`."""
    x_codes, row_scale = quantize_rows(x, act_dtype)
    w_codes = jax.lax.bitcast_convert_type(codes, weight_dtype)
    sums = dot(x_codes.astype(jnp.float32), w_codes.astype(jnp.float32), 1)
    return rescale(sums, row_scale, col_scale, weight_dtype, act_dtype).astype(x.dtype)


def quantize_rows(
    x: Float[Array, "*batch k"], dtype: np.dtype
) -> tuple[Float[Array, "*batch k"], Float32[Array, "*batch"]]:
    """See `matmul_fp8.quantize_rows`."""
    x = x.astype(jnp.float32)
    scale = blockwise.absmax(x)
    nearer, reciprocal = blockwise.factors(scale)
    scaled = (x * nearer[..., None]) * (largest(dtype) * reciprocal)[..., None]
    return scaled.astype(dtype), scale


def rescale(
    sums: Float32[Array, "*batch n"],
    row_scale: Float32[Array, "*batch"],
    col_scale: Float32[Array, "n"],
    weight_dtype: np.dtype,
    act_dtype: np.dtype,
) -> Float32[Array, "*batch n"]:
    """Turns sums of products of codes into the numbers that they stand for."""
    unit = np.float32(1 / (float(largest(weight_dtype)) * float(largest(act_dtype))))
    return sums * (row_scale[..., None] * col_scale) * unit


def largest(dtype: np.dtype) -> np.float32:
    """Returns the largest number of a format, which stands for a row's absmax."""
    return np.float32(jnp.finfo(dtype).max)
