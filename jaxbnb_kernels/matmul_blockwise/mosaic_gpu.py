"""Which products the GPU kernels support."""

import numpy as np

from jaxbnb_kernels import _selection, _tiles
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise.mosaic_gpu import servable_blocks

MATMUL = _selection.Kernel("matmul_blockwise", "matmul")


def multiplier(weight: Weight, compute_dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    servable_blocks(weight.block_size, compute_dtype)
    _tiles.numbered(weight.absmax.size)
    return MATMUL
