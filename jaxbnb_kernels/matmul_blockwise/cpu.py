"""Which products the native CPU kernel supports."""

import numpy as np

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise.cpu import servable

MATMUL = _selection.Kernel.for_cpu("matmul_blockwise", "matmul")
# A group of 4-bit codes that is decoded at once lies in one block.
BLOCK_SIZE_MULTIPLE = 32


def multiplier(
    weight: Weight, dtype: np.dtype, compute_dtype: np.dtype
) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    if weight.block_size % BLOCK_SIZE_MULTIPLE:
        raise NotImplementedError(
            f"cpu needs blocks of a multiple of {BLOCK_SIZE_MULTIPLE} elements here; "
            f"got {weight.block_size}"
        )
    if weight.codes.size == 0:
        raise NotImplementedError("cpu does not support empty matrices")
    for each in (dtype, compute_dtype):
        servable(each)
    return MATMUL
