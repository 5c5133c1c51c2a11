"""How kernels are called: chosen for the device. They are not divided among devices."""

import functools

import numpy as np
from jaxtyping import Array, Float, Int32

from jaxbnb_kernels import _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels.grouped_matmul_blockwise import mosaic_gpu, xla
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.quantize_blockwise import kernels as quantize_kernels


def matmul(
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " groups"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "m n"]:
    """See `grouped_matmul_blockwise`; raises an error if no kernel supports it."""
    quantize_kernels.refuse_zero_point(kinds, weight.zero_point)
    kernels = _selection.serving(
        kinds, mosaic_gpu=lambda: mosaic_gpu.multiplier(weight, compute_dtype)
    )
    if weight.nested is None:
        arrays = weight.codes, weight.float_absmax()
    else:
        arrays = weight.codes, weight.absmax, *weight.nested
    (product,) = _selection.choose(
        kernels,
        _matmul_portable,
        x,
        group_sizes,
        *arrays,
        is_required=is_required,
        should_broadcast=False,
        codebook=quantize_kernels.to_bytes(weight.codebook),
        block_size=weight.block_size,
        size=weight.size,
        transpose=transpose,
        compute_dtype=compute_dtype,
    )
    return product


def _matmul_portable(x, *arrays, **options):
    one_by_one = functools.partial(_one_by_one, **options)
    return (over_leading_axes(one_by_one, x.ndim - 2, x, *arrays),)


def _one_by_one(
    x,
    group_sizes,
    codes,
    absmax,
    *nested,
    codebook,
    block_size,
    size,
    transpose,
    compute_dtype,
):
    levels = quantize_kernels.from_bytes(codebook)
    weight = Weight(codes, absmax, nested or None, levels, block_size, size)
    # On a CPU, each product has a native kernel.
    multiply = functools.partial(
        matmul_blockwise, transpose=transpose, compute_dtype=compute_dtype
    )
    columns = codes.shape[-2] if transpose else size
    return xla.one_by_one(multiply, x, group_sizes, weight, columns)
