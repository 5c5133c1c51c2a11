"""Which products the native CPU kernel supports."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _selection

# XLA multiplies bfloat16 in float32, from a copy of the matrix in float32. Only AMX has
# been measured to be faster than that.
MATMUL = _selection.Kernel.for_cpu("matmul_dense", "matmul", instructions="amx")


def multiplier(dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support a matrix's dtype."""
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"cpu multiplies bfloat16 here, got {dtype}")
    return MATMUL
