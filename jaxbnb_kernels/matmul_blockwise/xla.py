"""Products that split or interleave activations instead of decoded nibbles.

The even and the odd elements of a packed row decode to two matrices of half the width,
which XLA vectorises. Putting them back in order would cost more than decoding. So the
product over packed rows takes x's even and odd columns separately, and the transposed
product interleaves its result. Both are much smaller than the matrix.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels import _rows, blockwise
from jaxbnb_kernels.matmul_blockwise import reference
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise import xla as quantize_xla


def matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    """See `matmul_blockwise`."""
    return _rows.beside_zeros(
        lambda x: _matmul(x, weight, transpose, compute_dtype), x, compute_dtype
    )


def _matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
) -> Float[Array, "*batch n"]:
    if weight.codebook is None or len(weight.codebook) != 16:
        return reference.matmul(x, weight, transpose, compute_dtype)
    halves = quantize_xla.decode_nibbles(
        weight.codes,
        weight.float_absmax(),
        weight.codebook,
        weight.block_size,
        compute_dtype,
        weight.zero_point,
    )
    half_size = -(-weight.size // 2)
    even, odd = (blockwise.join(half, half_size) for half in halves)
    operand = x.astype(compute_dtype)
    if transpose:
        if weight.size % 2:
            operand = jnp.pad(operand, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
        product = reference.dot(operand[..., 0::2], even, 1)
        product = product + reference.dot(operand[..., 1::2], odd, 1)
    else:
        columns = [reference.dot(operand, half, 0) for half in (even, odd)]
        product = jnp.stack(columns, axis=-1).reshape(*x.shape[:-1], 2 * half_size)
        product = product[..., : weight.size]
    return product.astype(x.dtype)
