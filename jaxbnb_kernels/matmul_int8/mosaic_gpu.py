"""Which products the GPU kernels support, and how they are divided among devices."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels._tiles import MOST_INT8_COLUMNS, PRODUCT_COLUMNS
from jaxbnb_kernels.matmul_int8 import xla

SIXTEEN_BITS = (jnp.bfloat16, jnp.float16)
MATMUL = _selection.Kernel("matmul_int8", "matmul")


def matmul(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
    *,
    is_required: bool = True,
) -> Float[Array, "*batch n"]:
    """See `matmul_int8`; raises an error if no kernel supports the call."""
    k = codes.shape[1]
    if x.size == 0 or codes.size == 0:
        raise NotImplementedError("mosaic_gpu does not support empty arrays")
    if k % PRODUCT_COLUMNS or k > MOST_INT8_COLUMNS:
        raise NotImplementedError(
            f"mosaic_gpu needs a multiple of {PRODUCT_COLUMNS} columns, of at most "
            f"{MOST_INT8_COLUMNS}; got {k}"
        )
    if x.dtype not in (jnp.float32, *SIXTEEN_BITS):
        raise NotImplementedError(f"mosaic_gpu does not support {x.dtype}")
    if outlier_threshold and compute_dtype not in SIXTEEN_BITS:
        raise NotImplementedError(
            f"mosaic_gpu adds outliers in 16 bits; got compute_dtype {compute_dtype}"
        )
    (product,) = _selection.choose(
        MATMUL,
        _matmul_portable,
        x.reshape(math.prod(x.shape[:-1]), k),
        codes,
        col_scale,
        is_required=is_required,
        should_broadcast=False,
        divided=_matmul_divided,
        outlier_threshold=outlier_threshold,
        compute_dtype=compute_dtype,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(x, codes, col_scale, *, outlier_threshold, compute_dtype):
    def by_xla(x, codes, col_scale):
        return xla.matmul(x, codes, col_scale, outlier_threshold, compute_dtype)

    return (over_leading_axes(by_xla, codes.ndim - 2, x, codes, col_scale),)


def _matmul_divided(kernel, x, codes, col_scale, *, outlier_threshold, compute_dtype):
    # Outlier columns depend on all rows of x, and a whole row has one scale.
    operand_names = (None if outlier_threshold else "m", None), ("n", None), ("n",)
    multiply = functools.partial(
        kernel, outlier_threshold=outlier_threshold, compute_dtype=compute_dtype
    )
    arrays = x, codes, col_scale
    result_names = operand_names[0][0], "n"
    axes = _partition.of_matrices(
        [a.shape for a in arrays], (*operand_names, result_names)
    )
    return _partition.divide(multiply, axes, *arrays)
