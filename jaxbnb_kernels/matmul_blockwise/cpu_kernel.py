"""The product by the native CPU kernel, `_cpu/matmul_blockwise.cc`, called by XLA."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels._batching import as_one_stack
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.quantize_blockwise.reference import NESTED_BLOCK_SIZE

TARGET: Final = "jaxbnb_cpu_matmul_blockwise"
# A group of 4-bit codes that is decoded at once lies in one block.
BLOCK_SIZE_MULTIPLE: Final = 32
DTYPES: Final = ("float32", "bfloat16", "float16")


def matmul(
    x: Float[Array, "*leading m k"],
    codes: Integer[Array, "*leading rows stored"],
    absmax: Float32[Array, "*leading rows blocks"]
    | UInt8[Array, "*leading rows blocks"],
    *nested: Float32[Array, "*leading 1 entries"],
    codebook: bytes,
    block_size: int,
    size: int,
    transpose: bool,
    compute_dtype: np.dtype,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that the kernel supports it.

    Args:
        x: array of one of ``DTYPES``; the result has the same. A leading axis has size
            one in arrays that are the same along it.
        codes: see `dequantize_blockwise`.
        absmax: see `dequantize_blockwise`.
        *nested: nested absmax and offset, if any; a row for each matrix.
        codebook: bytes of the 16 or 256 float32 levels; none for linear int8.
        block_size: a multiple of ``BLOCK_SIZE_MULTIPLE``.
        size: elements of a row of W.
        transpose: whether to contract with W's last axis.
        compute_dtype: one of ``DTYPES``, for x and the decoded W in the product.
    """
    multiply = functools.partial(
        _multiply,
        codebook=codebook,
        block_size=block_size,
        size=size,
        transpose=transpose,
        compute_dtype=compute_dtype,
    )
    return (as_one_stack(multiply, x, codes, absmax, *nested),)


def _multiply(
    x, codes, absmax, *nested, codebook, block_size, size, transpose, compute_dtype
):
    levels = [jnp.asarray(np.frombuffer(codebook, np.float32))]
    if nested:
        levels += [*nested, jnp.asarray(DYNAMIC8_SIGNED)]
    n = codes.shape[-2] if transpose else size
    call = jax.ffi.ffi_call(
        TARGET, jax.ShapeDtypeStruct((len(x), x.shape[-2], n), x.dtype)
    )
    return call(
        x,
        codes,
        absmax,
        *levels,
        block_size=np.int64(block_size),
        nested_block_size=np.int64(NESTED_BLOCK_SIZE),
        size=np.int64(size),
        transpose=transpose,
        compute_dtype=np.dtype(compute_dtype).name,
    )
