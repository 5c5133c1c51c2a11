"""Which products the native CPU kernel supports."""

import numpy as np

from jaxbnb_kernels import _selection
from jaxbnb_kernels.quantize_blockwise.cpu import servable

MATMUL = _selection.Kernel.for_cpu("matmul_int8", "matmul")


def multiplier(dtype: np.dtype, compute_dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the dtypes."""
    for each in (dtype, compute_dtype):
        servable(each)
    return MATMUL
