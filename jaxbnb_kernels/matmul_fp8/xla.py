"""A product of fp8 arrays, which XLA lowers.

XLA knows which GPUs multiply fp8. For Hopper it makes a kernel of ``wgmma``
instructions of e4m3 and e5m2. For other GPUs it converts the operands to a float in
which they are exact. For a CPU that would be float32. So this module converts them to
bfloat16 first: they are exact in it too, it takes half the memory, and a CPU has
instructions for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels import _rows
from jaxbnb_kernels.matmul_blockwise.reference import dot
from jaxbnb_kernels.matmul_fp8 import reference

_BFLOAT16 = np.dtype(jnp.bfloat16)


def matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    weight_dtype: np.dtype,
    act_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_fp8`."""
    x_codes, row_scale = reference.quantize_rows(x, act_dtype)
    w_codes = jax.lax.bitcast_convert_type(codes, weight_dtype)
    sums = jax.lax.platform_dependent(
        x_codes, w_codes, cpu=_in_bfloat16, default=lambda x, w: dot(x, w, 1)
    )
    y = reference.rescale(sums, row_scale, col_scale, weight_dtype, act_dtype)
    return y.astype(x.dtype)


def _in_bfloat16(x_codes: Array, w_codes: Array) -> Array:
    matrix = w_codes.astype(_BFLOAT16)
    return _rows.beside_zeros(
        lambda rows: dot(rows, matrix, 1), x_codes.astype(_BFLOAT16), _BFLOAT16
    )
