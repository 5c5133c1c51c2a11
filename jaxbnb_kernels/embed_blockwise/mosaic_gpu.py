"""Which look-ups the GPU kernel supports."""

import numpy as np

from jaxbnb_kernels import _selection, _tiles
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise.mosaic_gpu import servable

EMBED = _selection.Kernel("embed_blockwise", "embed")


def embedder(weight: Weight, dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    servable(weight.codebook, weight.block_size, dtype)
    _tiles.numbered(weight.absmax.size)
    if weight.size % weight.block_size:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of whole blocks of {weight.block_size}; these "
            f"have {weight.size} elements"
        )
    least = _tiles.least_rows(weight.block_size, dtype)
    if weight.absmax.shape[-1] < least:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of at least {least * weight.block_size} "
            f"elements here; these have {weight.size}"
        )
    return EMBED
