"""How kernels are called: chosen for the device, and divided among devices."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels.matmul_blockwise import cpu, mosaic_gpu, xla
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax
from jaxbnb_kernels.quantize_blockwise import kernels as quantize_kernels


def matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "*batch n"]:
    """See `matmul_blockwise`; raises an error if no kernel supports the call."""
    quantize_kernels.refuse_zero_point(kinds, weight.zero_point)
    kernels = _selection.serving(
        kinds,
        mosaic_gpu=lambda: mosaic_gpu.multiplier(weight, compute_dtype),
        cpu=lambda: cpu.multiplier(weight, x.dtype, compute_dtype),
    )
    if weight.nested is None:
        absmax, nested = weight.float_absmax(), ()
    else:
        absmax, (nested_absmax, offset) = weight.absmax, weight.nested
        # Reshaped to as many axes as the matrices have.
        nested = nested_absmax[..., None, :], offset[..., None, None]
    (product,) = _selection.choose(
        kernels,
        _matmul_portable,
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
        weight.codes,
        absmax,
        *nested,
        is_required=is_required,
        should_broadcast=False,
        divided=_matmul_divided,
        codebook=quantize_kernels.to_bytes(weight.codebook),
        block_size=weight.block_size,
        size=weight.size,
        transpose=transpose,
        compute_dtype=compute_dtype,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(x, codes, *absmax, **options):
    by_xla = functools.partial(_matmul_by_xla, **options)
    return (over_leading_axes(by_xla, codes.ndim - 2, x, codes, *absmax),)


def _matmul_by_xla(
    x, codes, absmax, *nested, codebook, block_size, size, transpose, compute_dtype
):
    levels = quantize_kernels.from_bytes(codebook)
    matrix_nested = (nested[0][0], nested[1][0, 0]) if nested else None
    weight = Weight(codes, absmax, matrix_nested, levels, block_size, size)
    return xla.matmul(x, weight, transpose, compute_dtype)


def _matmul_divided(kernel, x, codes, absmax, *nested, size, **options):
    floats = absmax
    if nested:
        count = codes.ndim - 2
        floats = over_leading_axes(_float_absmax, count, absmax, *nested)
    whole = codes.shape
    columns = quantize_kernels.of_blocks(size, options["block_size"])
    x_name, y_name = ("n", columns)[:: -1 if options["transpose"] else 1]
    w_names = "n", columns

    def multiply(x, codes, floats, *nested):
        part_size = size * codes.shape[-1] // max(whole[-1], 1)
        # A block's nested block is known only in a whole matrix.
        absmax = nested if nested and codes.shape[-2:] == whole[-2:] else (floats,)
        return kernel(x, codes, *absmax, size=part_size, **options)

    def unrounded(x, *weight):
        # x in the dtype of the sums, which the result then has too.
        return multiply(x.astype(jnp.float32), *weight)

    arrays = (x, codes, floats, *((absmax, *nested) if nested else ()))
    nested_names = (w_names, (None, None), (None, None)) if nested else ()
    axes = _partition.of_matrices(
        [a.shape for a in arrays],
        (("m", x_name), w_names, w_names, *nested_names, ("m", y_name)),
    )
    return _partition.divide(multiply, axes, *arrays, unrounded=unrounded)


def _float_absmax(absmax, nested_absmax, offset):
    return dequantize_absmax(absmax, nested_absmax[0], offset[0, 0])
