"""The specification: decode the matrix, then take its rows."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels.matmul_blockwise import Weight, reference


def embed(
    ids: Integer[Array, "*batch"], weight: Weight, dtype: np.dtype
) -> Float[Array, "*batch size"]:
    """See `embed_blockwise`."""
    return jnp.take(reference.decode(weight.with_float_scales(), dtype), ids, axis=0)
