"""Which grouped products the GPU kernels support."""

import numpy as np

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu as of_one

# Rows of a group, on average, up to which one launch multiplies all groups. It decodes
# codes again for every 16 rows: 15 instructions a weight. Not measured.
MOST_ROWS = 64
MATMUL = _selection.Kernel("grouped_matmul_blockwise", "matmul")


def multiplier(weight: Weight, compute_dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    of_one.multiplier(weight, compute_dtype)
    return MATMUL
