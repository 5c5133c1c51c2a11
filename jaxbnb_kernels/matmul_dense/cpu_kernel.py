"""The product by the native CPU kernel, `_cpu/matmul_blockwise.cc`, called by XLA."""

from typing import Final

import jax
from jaxtyping import Array, BFloat16, Float

from jaxbnb_kernels._batching import as_one_stack

TARGET: Final = "jaxbnb_cpu_matmul_dense"


def matmul(
    x: Float[Array, "*leading m k"],
    weight: BFloat16[Array, "*leading rows size"],
    *,
    transpose: bool,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that the kernel supports it.

    Args:
        x: bfloat16; or float32, for a result in float32.
        weight: matrices. A leading axis has size one in arrays that are the same along
            it.
        transpose: whether to contract with the last axis of ``weight``.
    """

    def multiply(x, weight):
        n = weight.shape[1 if transpose else 2]
        result = jax.ShapeDtypeStruct((len(x), x.shape[1], n), x.dtype)
        return jax.ffi.ffi_call(TARGET, result)(x, weight, transpose=transpose)

    return (as_one_stack(multiply, x, weight),)
