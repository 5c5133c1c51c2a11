"""The product with a quantised matrix, for Hopper GPUs.

Few rows of x: ``x @ W.T`` by `fused` and ``x @ W``, which is the gradient of the other,
by `gradient`. Both decode W as it is read.

Otherwise W is decoded by the kernel of `dequantize_blockwise`, and XLA multiplies with
it: for many rows of x, where reading W takes a fraction of the time of the product; for
float32, 8-bit codebooks, and rows of W that are no whole tiles.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels import _hopper, _partition
from jaxbnb_kernels.matmul_blockwise import fused, gradient, reference, xla
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu as quantize_mosaic_gpu

# By the bytes that it moves, decoding to memory costs 235 / M of the time of a dense
# product of M rows: less than half of it beyond this. The kernels decode W anew for
# each 128 rows: by the instructions two thirds of the tensor cores' time, and beside
# them at best. Not measured.
MOST_TOKENS = 512


def matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
    *,
    required: bool = True,
) -> Float[Array, "*batch n"]:
    """See `matmul_blockwise`; raises where no kernel can serve the call."""
    # Refuses what neither kernel serves.
    codebook = quantize_mosaic_gpu.servable(
        weight.codebook, weight.block_size, compute_dtype
    )
    if weight.nested is None:
        absmax, nested = weight.float_absmax(), ()
    else:
        absmax, (nested_absmax, offset) = weight.absmax, weight.nested
        # Of as many axes as the matrices.
        nested = nested_absmax[..., None, :], offset[..., None, None]
    (product,) = _hopper.run(
        matmul_kernel,
        _matmul_portable,
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
        weight.codes,
        absmax,
        *nested,
        required=required,
        broadcast=False,
        divided=_matmul_divided,
        codebook=codebook,
        block_size=weight.block_size,
        size=weight.size,
        transpose=transpose,
        compute_dtype=compute_dtype,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(x, codes, *absmax, **options):
    one = functools.partial(_matmul_by_xla, **options)
    return (_hopper.over_leading_axes(one, codes.ndim - 2, x, codes, *absmax),)


def _matmul_by_xla(
    x, codes, absmax, *nested, codebook, block_size, size, transpose, compute_dtype
):
    levels = np.frombuffer(codebook, np.float32)
    of_matrix = (nested[0][0], nested[1][0, 0]) if nested else None
    weight = Weight(codes, absmax, of_matrix, levels, block_size, size)
    return xla.matmul(x, weight, transpose, compute_dtype)


def _matmul_divided(x, codes, absmax, *nested, size, **options):
    floats = absmax
    if nested:
        count = codes.ndim - 2
        floats = _hopper.over_leading_axes(_float_absmax, count, absmax, *nested)
    whole = codes.shape
    columns = quantize_mosaic_gpu.of_blocks(size, options["block_size"])
    of_x, of_y = ("n", columns)[:: -1 if options["transpose"] else 1]
    of_w = "n", columns

    def kernel(x, codes, floats, *nested):
        of_part = size * codes.shape[-1] // max(whole[-1], 1)
        # Which nested block is whose, only a whole matrix knows.
        absmax = nested if nested and codes.shape[-2:] == whole[-2:] else (floats,)
        return matmul_kernel(x, codes, *absmax, size=of_part, **options)

    def unrounded(x, *of_w):
        # In the dtype of sums, which the result then has.
        return kernel(x.astype(jnp.float32), *of_w)

    arrays = (x, codes, floats, *((absmax, *nested) if nested else ()))
    of_nested = (of_w, (None, None), (None, None)) if nested else ()
    axes = _partition.of_matrices(
        [a.shape for a in arrays], (("m", of_x), of_w, of_w, *of_nested, ("m", of_y))
    )
    return _partition.divide(kernel, axes, *arrays, unrounded=unrounded)


def _float_absmax(absmax, nested_absmax, offset):
    return dequantize_absmax(absmax, nested_absmax[0], offset[0, 0])


def matmul_kernel(
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
    config: fused.Config | gradient.Config | None = None,
) -> tuple[Float[Array, "*leading m n"]]:
    """The product itself, for who has checked that it can be computed.

    Args:
        x: of a floating dtype, which the result has. Leading axes are of one in
            arrays that are the same along them.
        codes: as of `dequantize_blockwise`.
        absmax: as of `dequantize_blockwise`.
        *nested: if it is, the nested absmax and the offset, a row a matrix.
        codebook: the bytes of its float32 levels: hashable, as static arguments are.
        block_size: one of ``BLOCK_SIZES`` of `quantize_blockwise`.
        size: elements of a row of W.
        transpose: contract with W's rows.
        compute_dtype: of x and the levels in the product.
        config: how it is divided; None for the heuristic.
    """
    options = {
        "codebook": codebook,
        "block_size": block_size,
        "size": size,
        "transpose": transpose,
        "compute_dtype": compute_dtype,
        "config": config,
    }
    arrays = x, codes, absmax, *nested
    for axis in range(codes.ndim - 2):
        if all(a.shape[axis] == 1 for a in arrays[1:]):
            # The same matrix: the rows of x side by side.
            together = jnp.moveaxis(x, axis, -3)
            count = math.prod(together.shape[-3:-1])
            rows = together.reshape(*together.shape[:-3], count, x.shape[-1])
            one = [jnp.squeeze(a, axis) for a in arrays[1:]]
            (product,) = matmul_kernel(rows, *one, **options)
            product = product.reshape(*together.shape[:-1], product.shape[-1])
            return (jnp.moveaxis(product, -3, axis),)
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in arrays))
    x, codes, absmax, *of_absmax = (
        jnp.broadcast_to(a, leading + a.shape[-2:]).reshape(
            math.prod(leading), *a.shape[-2:]
        )
        for a in arrays
    )
    levels = np.frombuffer(codebook, np.float32)
    # Of which the config is.
    kernel: Any = fused if transpose else gradient
    is_fused = (
        0 < x.shape[1] <= MOST_TOKENS
        and codes.size > 0
        and size % fused.COLUMNS == 0
        and len(levels) == 16
        and compute_dtype != jnp.float32
    )
    if is_fused:
        out_dtype, x = x.dtype, x.astype(compute_dtype)
        config = config or kernel.heuristic(x.shape[1], codes.shape[1], size, len(x))
        product = kernel.multiply(
            x, codes, absmax, of_absmax, levels, block_size, config, out_dtype
        )
    else:
        (matrix,) = quantize_mosaic_gpu.dequantize_kernel(
            codes,
            absmax,
            *of_absmax,
            codebook=codebook,
            block_size=block_size,
            size=size,
            dtype=compute_dtype,
        )
        dot = functools.partial(reference.dot, axis=1 if transpose else 0)
        product = jax.vmap(dot)(x.astype(compute_dtype), matrix).astype(x.dtype)
    return (product.reshape(*leading, *product.shape[1:]),)
