"""Blockwise quantisation in one pass over memory: the native kernels for CPUs.

Codes, absmax and decoded numbers are the reference's, bit for bit, and do not depend on
the number of threads.
"""

from typing import Final

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import _cells
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, decision_points

QUANTIZE_4BIT: Final = "jaxbnb_cpu_quantize_4bit"
QUANTIZE_8BIT: Final = "jaxbnb_cpu_quantize_8bit"
QUANTIZE_LINEAR: Final = "jaxbnb_cpu_quantize_linear"
DEQUANTIZE: Final = "jaxbnb_cpu_dequantize_blockwise"
DTYPES: Final = ("float32", "bfloat16", "float16")


def quantize(
    x: Float[Array, "*batch n"], *, codebook: bytes, block_size: int
) -> tuple[Integer[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        x: array of one of ``DTYPES``.
        codebook: bytes of the float32 levels, hashable as static arguments must be;
            none for linear int8.
        block_size: a positive even number.

    Raises:
        NotImplementedError: the codebook cannot be encoded, see `_cells.of_codebook`.
    """
    levels = np.frombuffer(codebook, np.float32)
    is_4bit = len(levels) == 16
    *batch, size = x.shape
    stored, blocks = -(-size // 2) if is_4bit else size, -(-size // block_size)
    results = (
        jax.ShapeDtypeStruct((*batch, stored), jnp.uint8 if codebook else jnp.int8),
        jax.ShapeDtypeStruct((*batch, blocks), jnp.float32),
    )
    if not codebook:
        call = jax.ffi.ffi_call(QUANTIZE_LINEAR, results)
        codes, absmax = call(x, block_size=np.int64(block_size))
        return codes, absmax
    points, codes = decision_points(levels)
    if is_4bit:
        missing = 15 - len(points)
        call = jax.ffi.ffi_call(QUANTIZE_4BIT, results)
        codes, absmax = call(
            x,
            points=np.pad(points, (0, missing), constant_values=np.inf),
            codes=np.pad(codes, (0, missing), mode="edge").astype(np.uint8),
            block_size=np.int64(block_size),
        )
        return codes, absmax
    cells, table = _cells.of_codebook(codebook)
    call = jax.ffi.ffi_call(QUANTIZE_8BIT, results)
    code_of_nan = codes[-1]
    codes, absmax = call(
        x,
        jnp.asarray(table),
        lowest=np.float32(cells.lowest),
        shift=np.int64(cells.shift),
        first=np.int64(cells.first),
        per_sign=np.int64(cells.per_sign),
        is_signed=cells.is_signed,
        code_of_nan=np.int64(code_of_nan),
        block_size=np.int64(block_size),
    )
    return codes, absmax


def dequantize(
    codes: Integer[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    *nested: Float32[Array, "*shape"],
    codebook: bytes,
    block_size: int,
    size: int,
    dtype: np.dtype,
) -> tuple[Float[Array, "*batch {size}"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        codes: see `dequantize_blockwise`.
        absmax: see `dequantize_blockwise`.
        *nested: nested absmax and offset, if any, with the batch axes of the other
            arrays. There is one offset per matrix.
        codebook: bytes of the float32 levels, hashable as static arguments must be;
            none for linear int8.
        block_size: a positive even number.
        size: elements of the last axis.
        dtype: dtype of the result, one of ``DTYPES``.
    """
    levels = jnp.asarray(np.frombuffer(codebook, np.float32))
    absmax_levels = [jnp.asarray(DYNAMIC8_SIGNED)] if nested else []
    result = jax.ShapeDtypeStruct((*codes.shape[:-1], size), dtype)
    call = jax.ffi.ffi_call(DEQUANTIZE, result)
    decoded = call(
        codes, absmax, levels, *absmax_levels, *nested, block_size=np.int64(block_size)
    )
    return (decoded,)
