"""The int8 product: the parts that XLA computes, and the kernels for the rest.

XLA looks for the columns of outliers, in one pass over x. Then
`mosaic_gpu_kernel_rows` quantises the rows of x. Few rows are multiplied, scaled and
added to their outliers by `mosaic_gpu_kernel_product`, in one pass over W's codes. XLA
multiplies many rows, since the product takes longer than reading W does.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from jaxbnb_kernels._tiles import PRODUCT_COLUMNS
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_product as product_kernel
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_rows as rows_kernel
from jaxbnb_kernels.matmul_int8 import reference, xla

# Tiles of 128 rows of W and 64 of x read 3/128 of a byte a product from the L2 cache:
# 9 us for 128 rows and 4096 x 4096, at 5.5 TB/s. XLA's product reads W in 4 us, and
# moves its sums to memory and back in 1 more, with a launch in between. Not measured.
MOST_TOKENS = 128


def matmul(
    x: Float[Array, "*leading m k"],
    codes: Int8[Array, "*leading n k"],
    col_scale: Float32[Array, "*leading n"],
    *,
    outlier_threshold: float,
    compute_dtype: np.dtype,
    config: product_kernel.Config | None = None,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that the kernels support it.

    Args:
        x: array of any floating dtype; the result has the same. A leading axis has
            size one in arrays that are the same along it.
        codes: codes of W.
        col_scale: scales of W's rows.
        outlier_threshold: see `matmul_int8`.
        compute_dtype: dtype of the outliers' product.
        config: division of the product; None for the heuristic.
    """
    (m, k), n = x.shape[-2:], codes.shape[-2]
    leading = np.broadcast_shapes(x.shape[:-2], codes.shape[:-2], col_scale.shape[:-1])
    axes = range(len(leading))
    # W is the same along these axes. They become sets of rows of x, side by side.
    shared = [a for a in axes if codes.shape[a] == col_scale.shape[a] == 1]
    next_to_rows = range(-2 - len(shared), -2)
    w_leading = [leading[a] for a in axes if a not in shared]
    count = math.prod(w_leading)
    x = jnp.moveaxis(jnp.broadcast_to(x, (*leading, m, k)), shared, next_to_rows)
    codes = jnp.broadcast_to(jnp.squeeze(codes, shared), (*w_leading, n, k))
    col_scale = jnp.broadcast_to(jnp.squeeze(col_scale, shared), (*w_leading, n))
    y = _multiply(
        x.reshape(count, -1, m, k),
        codes.reshape(count, n, k),
        col_scale.reshape(count, n),
        outlier_threshold,
        compute_dtype,
        config,
    )
    return (jnp.moveaxis(y.reshape(*x.shape[:-1], n), next_to_rows, shared),)


def _multiply(
    x: Float[Array, "count sets m k"],
    codes: Int8[Array, "count n k"],
    col_scale: Float32[Array, "count n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
    config: product_kernel.Config | None,
) -> Float[Array, "count sets m n"]:
    """Multiplies sets of rows with each W; each set has its own outlier columns."""
    (count, sets, m, k), n = x.shape, codes.shape[1]
    tokens = sets * m
    columns = jnp.any(reference.is_outlier(x, outlier_threshold), axis=2)
    quantize = functools.partial(
        rows_kernel.quantize,
        x,
        columns if outlier_threshold else None,
        outlier_threshold,
    )
    if tokens > MOST_TOKENS:
        x_codes, row_scale, *_ = quantize(None, tokens)
        multiply = functools.partial(
            xla.multiply,
            outlier_threshold=outlier_threshold,
            compute_dtype=compute_dtype,
        )
        set_axes = (0, 0, 0, 0, None, None)
        return jax.vmap(jax.vmap(multiply, set_axes))(
            x,
            x_codes.reshape(x.shape),
            row_scale.reshape(x.shape[:-1]),
            columns,
            codes,
            col_scale,
        )
    config = config or product_kernel.heuristic(tokens, n, k, count)
    padded = math.ceil(tokens / config.block_m) * config.block_m
    x_codes, row_scale, *in_outliers = quantize(compute_dtype, padded)
    outliers = None
    if in_outliers:
        by_tile = columns.reshape(count, sets, k // PRODUCT_COLUMNS, PRODUCT_COLUMNS)
        flags = jnp.any(by_tile, axis=(1, 3)).astype(jnp.int32)
        outliers = product_kernel.Outliers(in_outliers[0], flags)
    y = product_kernel.multiply(
        x_codes, row_scale, outliers, codes, col_scale, tokens, config, x.dtype
    )
    return y.reshape(count, sets, m, n)
