"""Takes the codes of the rows that are looked up, and decodes only these."""

import numpy as np
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels.embed_blockwise import rows
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise


def embed(
    ids: Integer[Array, "*batch"], weight: Weight, dtype: np.dtype
) -> Float[Array, "*batch size"]:
    """See `embed_blockwise`."""
    at, absmax = rows.look_up(ids, weight)
    return dequantize_blockwise(
        weight.codes[at],
        absmax,
        weight.codebook,
        block_size=weight.block_size,
        size=weight.size,
        zero_point=None if weight.zero_point is None else weight.zero_point[at],
        dtype=dtype,
        implementation="xla",
    )
