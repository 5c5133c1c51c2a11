"""Which products the native CPU kernel supports."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _selection

# XLA multiplies matrices of 16 bits in float32, from a copy of the matrix in float32.
MATMUL = _selection.Kernel.for_cpu("matmul_dense", "matmul")


def multiplier(dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support a matrix's dtype."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cpu multiplies bfloat16 and float16, got {dtype}")
    return MATMUL
