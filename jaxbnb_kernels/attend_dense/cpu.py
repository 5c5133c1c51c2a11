"""Which attention the native CPU kernels support."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _selection

# XLA multiplies matrices of 16 bits in float32, and writes all scores to memory.
ATTEND = _selection.Kernel.for_cpu("attend_dense", "attend")
GRADIENT = _selection.Kernel.for_cpu("attend_dense", "gradient")


def supported(kernel: _selection.Kernel, dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the arrays' dtype."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"cpu attends in bfloat16 and float32, got {dtype}")
    return kernel
