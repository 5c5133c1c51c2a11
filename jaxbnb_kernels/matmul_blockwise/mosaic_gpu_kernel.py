"""The product with a quantised matrix: which kernel computes it, by the number of rows.

For few rows of x, `mosaic_gpu_kernel_forward` computes ``x @ W.T``, and
`mosaic_gpu_kernel_gradient` computes ``x @ W``, which is the gradient of the other.
Both decode 4-bit codes as they read them, and multiply with Hopper's ``wgmma``. For
8-bit codes, and on all other GPUs, `mosaic_gpu_kernel_mma_forward` and
`mosaic_gpu_kernel_mma_gradient` take their place.

Otherwise the kernel of `dequantize_blockwise` decodes W, and XLA multiplies with it.
This holds for many rows of x, where reading W takes a fraction of the product's time,
for float32, and for rows of W that are not whole tiles. XLA decodes linear int8 by
itself: it needs no table for that, and does it in one pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._batching import as_one_stack
from jaxbnb_kernels._tiles import PRODUCT_COLUMNS
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_forward as forward
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_gradient as gradient
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_forward as mma_forward
from jaxbnb_kernels.matmul_blockwise import (
    mosaic_gpu_kernel_mma_gradient as mma_gradient,
)
from jaxbnb_kernels.matmul_blockwise import reference
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES, Levels
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_mma_fragments import (
    has_products_of,
)
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu_kernel as quantize_kernels
from jaxbnb_kernels.quantize_blockwise import xla as quantize_xla

# Judged by the bytes it moves, decoding to memory takes 235 / M of the time of a dense
# product of M rows: less than half beyond this limit. The kernels decode W again for
# every 128 rows. Judged by instructions, that takes two thirds of the tensor cores'
# time, and at best runs next to them. Not measured.
MOST_TOKENS = 512
# Kernels with mma.sync decode W again for every 32 rows: 20 instructions a weight for
# 128 rows. Decoding to memory moves 4.6 bytes, in whose time an A100 issues 44, and
# most other GPUs more. Not measured.
MOST_TOKENS_OF_WARPS = 128


def matmul(
    x: Float[Array, "*leading m k"],
    codes: UInt8[Array, "*leading rows stored"],
    absmax: Float32[Array, "*leading rows blocks"]
    | UInt8[Array, "*leading rows blocks"],
    *nested: Float32[Array, "*leading 1 entries"],
    codebook: bytes,
    block_size: int,
    size: int,
    transpose: bool,
    compute_dtype: np.dtype,
    config: forward.Config | gradient.Config | None = None,
) -> tuple[Float[Array, "*leading m n"]]:
    """Computes the product. The caller has checked that a kernel supports it.

    Args:
        x: array of any floating dtype; the result has the same. A leading axis has
            size one in arrays that are the same along it.
        codes: see `dequantize_blockwise`.
        absmax: see `dequantize_blockwise`.
        *nested: nested absmax and offset, if any; a row for each matrix.
        codebook: bytes of the float32 levels, hashable as static arguments must be;
            none for linear int8.
        block_size: one of ``BLOCK_SIZES`` of `quantize_blockwise`.
        size: elements of a row of W.
        transpose: whether to contract with W's last axis.
        compute_dtype: dtype of x and of the levels in the product.
        config: division of the product; None for the heuristic.
    """
    multiply = functools.partial(
        _multiply,
        codebook=codebook,
        block_size=block_size,
        size=size,
        transpose=transpose,
        compute_dtype=compute_dtype,
        config=config,
    )
    return (as_one_stack(multiply, x, codes, absmax, *nested),)


def _multiply(
    x,
    codes,
    absmax,
    *nested,
    codebook,
    block_size,
    size,
    transpose,
    compute_dtype,
    config,
):
    levels = Levels.of(codebook)
    is_by_warpgroup = target().architecture.has_wgmma and levels.lookup is NIBBLES
    most = MOST_TOKENS if is_by_warpgroup else MOST_TOKENS_OF_WARPS
    is_fused = (
        0 < x.shape[1] <= most
        and codes.size > 0
        and size % PRODUCT_COLUMNS == 0
        and has_products_of(compute_dtype)
    )
    if is_fused:
        out_dtype, x = x.dtype, x.astype(compute_dtype)
        shape = x.shape[1], codes.shape[1], size, len(x)
        # A config is one of this kernel.
        kernel: Any
        if is_by_warpgroup:
            kernel = forward if transpose else gradient
            config = config or kernel.heuristic(*shape)
            return kernel.multiply(
                x, codes, absmax, nested, levels.values, block_size, config, out_dtype
            )
        kernel = mma_forward if transpose else mma_gradient
        config = config or kernel.heuristic(*shape, levels.lookup)
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        return kernel.multiply(
            x, codes, absmax, nested, levels, block_size, config, out_dtype
        )
    matrix = _decode(codes, absmax, nested, codebook, block_size, size, compute_dtype)
    dot = functools.partial(reference.dot, axis=1 if transpose else 0)
    return jax.vmap(dot)(x.astype(compute_dtype), matrix).astype(x.dtype)


def _decode(codes, absmax, nested, codebook, block_size, size, dtype):
    if not codebook:
        of_matrices = [x[:, 0] for x in nested]
        if of_matrices:
            of_matrices[1] = of_matrices[1][:, 0]
        return quantize_xla.dequantize(
            codes, absmax, tuple(of_matrices) or None, None, block_size, size, dtype
        )
    (matrix,) = quantize_kernels.dequantize(
        codes,
        absmax,
        *nested,
        codebook=codebook,
        block_size=block_size,
        size=size,
        dtype=dtype,
    )
    return matrix
