"""The specification: decode the matrix, then take its rows."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise


def embed(
    ids: Integer[Array, "*batch"], weight: Weight, dtype: np.dtype
) -> Float[Array, "*batch size"]:
    matrix = dequantize_blockwise(
        weight.codes,
        weight.float_absmax(),
        weight.codebook,
        block_size=weight.block_size,
        size=weight.size,
        dtype=dtype,
        implementation="reference",
    )
    return jnp.take(matrix, ids, axis=0)
