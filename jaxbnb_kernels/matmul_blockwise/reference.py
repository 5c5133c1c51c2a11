"""The specification: decode the matrix, then multiply."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise


def matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_blockwise`."""
    matrix = decode(weight, compute_dtype)
    return dot(x.astype(compute_dtype), matrix, 1 if transpose else 0).astype(x.dtype)


def decode(weight: Weight, dtype: np.dtype) -> Float[Array, "rows size"]:
    """Decodes the whole matrix."""
    return dequantize_blockwise(
        weight.codes,
        weight.float_absmax(),
        weight.codebook,
        block_size=weight.block_size,
        size=weight.size,
        zero_point=weight.zero_point,
        dtype=dtype,
        implementation="reference",
    )


def dot(
    x: Float[Array, "*batch k"], matrix: Float[Array, "rows size"], axis: int
) -> Float[Array, "*batch n"]:
    """Multiplies x with the matrix over its ``axis``, accumulating in float32."""
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, matrix, contract, preferred_element_type=jnp.float32)
