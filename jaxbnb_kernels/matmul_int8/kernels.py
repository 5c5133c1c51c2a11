"""How kernels are called: chosen for the device, and divided among devices."""

import functools
import math

import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels.matmul_int8 import cpu, mosaic_gpu, xla


def matmul(
    x: Float[Array, "*batch k"],
    codes: Int8[Array, "n k"],
    col_scale: Float32[Array, "n"],
    outlier_threshold: float,
    compute_dtype: np.dtype,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "*batch n"]:
    """See `matmul_int8`; raises an error if no kernel supports the call."""
    kernels = _selection.serving(
        kinds,
        mosaic_gpu=lambda: mosaic_gpu.multiplier(
            x, codes, outlier_threshold, compute_dtype
        ),
        cpu=lambda: cpu.multiplier(x.dtype, compute_dtype, is_required),
    )
    k = codes.shape[1]
    (product,) = _selection.choose(
        kernels,
        _matmul_portable,
        x.reshape(math.prod(x.shape[:-1]), k),
        codes,
        col_scale,
        is_required=is_required,
        should_broadcast=False,
        divided=_matmul_divided,
        outlier_threshold=outlier_threshold,
        compute_dtype=compute_dtype,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(x, codes, col_scale, *, outlier_threshold, compute_dtype):
    def by_xla(x, codes, col_scale):
        return xla.matmul(x, codes, col_scale, outlier_threshold, compute_dtype)

    return (over_leading_axes(by_xla, codes.ndim - 2, x, codes, col_scale),)


def _matmul_divided(kernel, x, codes, col_scale, *, outlier_threshold, compute_dtype):
    # Outlier columns depend on all rows of x, and a whole row has one scale.
    operand_names = (None if outlier_threshold else "m", None), ("n", None), ("n",)
    multiply = functools.partial(
        kernel, outlier_threshold=outlier_threshold, compute_dtype=compute_dtype
    )
    arrays = x, codes, col_scale
    result_names = operand_names[0][0], "n"
    axes = _partition.of_matrices(
        [a.shape for a in arrays], (*operand_names, result_names)
    )
    return _partition.divide(multiply, axes, *arrays)
