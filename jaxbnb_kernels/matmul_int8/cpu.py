"""Which products the native CPU kernel supports."""

import numpy as np

from jaxbnb_kernels import _selection, native
from jaxbnb_kernels.quantize_blockwise.cpu import servable

MATMUL = _selection.Kernel.for_cpu("matmul_int8", "matmul")


def multiplier(
    dtype: np.dtype, compute_dtype: np.dtype, is_required: bool
) -> _selection.Kernel:
    """Returns the kernel; raises an error if it should not compute the product."""
    for each in (dtype, compute_dtype):
        servable(each)
    if native.instruction_set() == "amx" and not is_required:
        raise NotImplementedError(
            "cpu multiplies int8 without AMX tiles, which XLA's code uses"
        )
    return MATMUL
