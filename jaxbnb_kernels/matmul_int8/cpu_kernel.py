"""The product by the native CPU kernel, `_cpu/matmul_int8.cc`, called by XLA."""

from typing import Final

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from jaxbnb_kernels._batching import as_one_stack, one_after_another

TARGET: Final = "jaxbnb_cpu_matmul_int8"


def matmul(
    x: Float[Array, "*leading m k"],
    codes: Int8[Array, "*leading n k"],
    col_scale: Float32[Array, "*leading n"],
    *,
    outlier_threshold: float,
    compute_dtype: np.dtype,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that the kernel supports it.

    Args:
        x: float32, bfloat16 or float16 array; the result has the same dtype. A leading
            axis has size one in arrays that are the same along it.
        codes: codes of W.
        col_scale: scales of W's rows.
        outlier_threshold: see `matmul_int8`.
        compute_dtype: dtype of the outliers' product.
    """

    def multiply(x, codes, col_scale):
        shape = len(x), x.shape[1], codes.shape[1]
        call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, x.dtype))
        return call(
            x,
            codes,
            col_scale,
            outlier_threshold=np.float32(outlier_threshold),
            compute_dtype=np.dtype(compute_dtype).name,
        )

    if not outlier_threshold:
        return (as_one_stack(multiply, x, codes, col_scale[..., None]),)

    def multiply_one(x, codes, col_scale):
        return multiply(x[None], codes[None], col_scale[None])[0]

    # Each example has outlier columns of its own, so rows are not put side by side.
    return (one_after_another(multiply_one, codes.ndim - 2, x, codes, col_scale),)
