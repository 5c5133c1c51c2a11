"""The same as a product of fp8 arrays, which XLA is left to lower.

It knows which GPUs multiply fp8: for Hopper it makes a kernel of ``wgmma`` e4m3 and
e5m2 instructions; for a GPU without, and for a CPU, it converts the operands first,
to a wider float in which they are exact.
"""

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels.matmul_blockwise.reference import dot
from jaxbnb_kernels.matmul_fp8 import reference


def matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    weight_dtype: np.dtype,
    act_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_fp8`."""
    x_codes, row_scale = reference.quantize_rows(x, act_dtype)
    sums = dot(x_codes, jax.lax.bitcast_convert_type(codes, weight_dtype), 1)
    y = reference.rescale(sums, row_scale, col_scale, weight_dtype, act_dtype)
    return y.astype(x.dtype)
