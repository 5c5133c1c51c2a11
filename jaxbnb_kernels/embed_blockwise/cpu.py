"""Which look-ups the native CPU kernel supports."""

import numpy as np

from jaxbnb_kernels import _selection
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise.cpu import servable

EMBED = _selection.Kernel.for_cpu("embed_blockwise", "embed")


def embedder(weight: Weight, dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    servable(dtype)
    if weight.size % weight.block_size:
        raise NotImplementedError(
            f"cpu looks up rows of whole blocks of {weight.block_size}; these have "
            f"{weight.size} elements"
        )
    return EMBED
