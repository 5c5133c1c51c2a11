"""Which products the GPU kernels support."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxbnb_kernels import _selection
from jaxbnb_kernels._tiles import MOST_INT8_COLUMNS, PRODUCT_COLUMNS

SIXTEEN_BITS = (jnp.bfloat16, jnp.float16)
MATMUL = _selection.Kernel("matmul_int8", "matmul")


def multiplier(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
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
    return MATMUL
