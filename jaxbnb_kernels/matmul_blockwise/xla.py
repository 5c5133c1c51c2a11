"""The same without interleaving decoded nibbles: the activations are split instead.

The even and the odd elements of a packed row decode to two matrices of half the width,
which XLA vectorises; putting them back in order would cost more than decoding. So the
product over packed rows takes x's even and odd columns apart, and the transposed
product interleaves its result: both much smaller than the matrix.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels import _blocks
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
    if math.prod(x.shape[:-1]) == 1 and np.dtype(compute_dtype).itemsize == 2:
        # For one row in 16 bits XLA on a CPU decodes the matrix to float32, which
        # takes twice the memory; for two it does not.
        row = x.reshape(1, x.shape[-1])
        rows = jnp.concatenate([row, jnp.zeros_like(row)])
        y = _matmul(rows, weight, transpose, compute_dtype)
        return y[:1].reshape(*x.shape[:-1], y.shape[-1])
    return _matmul(x, weight, transpose, compute_dtype)


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
    )
    half_size = -(-weight.size // 2)
    even, odd = (_blocks.join(half, half_size) for half in halves)
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
