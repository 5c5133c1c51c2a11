"""Quantisation of the rows of x in one pass over memory, for Hopper GPUs.

A warpgroup reads a row once for its largest magnitude, and once more, from the cache,
for its codes. That moves 3 bytes per 16-bit element. XLA takes two passes and moves 5.
Which columns have outliers depends on all rows: XLA finds them beforehand.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from jaxbnb_kernels import blockwise
from jaxbnb_kernels._mosaic_gpu import pallas
from jaxbnb_kernels._mosaic_gpu.instructions import reciprocal as invert
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_fragments as fragments

# Columns at a time; shorter rows are padded.
CHUNK = 2048


def quantize(
    x: Float[Array, "count sets m k"],
    columns: Bool[Array, "count sets k"] | None,
    outlier_threshold: float,
    outlier_dtype: np.dtype | None,
    rows: int,
) -> tuple[Array, ...]:
    """Returns the codes and scales of `reference.quantize_inliers`, and the outliers.

    Args:
        x: sets of rows; each set has its own outlier columns. k is a multiple of 64.
        columns: outlier columns; None if the threshold is 0.
        outlier_threshold: magnitude at which an element stays out of its row's scale.
        outlier_dtype: dtype of outliers, which are x in outlier columns and zero
            elsewhere. With it, columns are permuted for the product's kernel. None to
            do neither.
        rows: number of result rows; those beyond x repeat its last row.

    Returns:
        Codes, int8 ``(count, rows, k)``; scales, float32 ``(count, rows)``; and, if
        columns and a dtype are passed, outliers ``(count, rows, k)`` of that dtype.
    """
    count, sets, m, k = x.shape
    size = max(k, CHUNK)
    groups, at_once = size // fragments.GROUP, CHUNK // fragments.GROUP
    # The last chunk overlaps the one before it instead of ending early.
    chunks = [
        pl.ds(min(i * at_once, groups - at_once), at_once)
        for i in range(math.ceil(groups / at_once))
    ]

    def in_groups(array):
        filled = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - k)])
        return filled.reshape(*array.shape[:-1], groups, fragments.GROUP)

    layout = fragments.row_layout()
    group_layout = layout.reduce((1,))
    is_permuted = outlier_dtype is not None
    masks = [] if columns is None else [jnp.where(columns, 0, -1).astype(jnp.int8)]
    masks, num_masks = [in_groups(mask) for mask in masks], len(masks)

    def quantize_rows(x_ref, *refs):
        kept_refs, refs = refs[:num_masks], refs[num_masks:]
        codes_ref, *outliers_refs, scale_ref = refs
        matrix, row = jax.lax.axis_index("matrix"), jax.lax.axis_index("row")
        x_row = jnp.minimum(row, sets * m - 1)
        row_set = x_row // m

        def read(chunk):
            values = pallas.load(x_ref.at[matrix, x_row, chunk], layout)
            return values.astype(jnp.float32)

        magnitudes = [jnp.abs(_inliers(read(c), outlier_threshold)) for c in chunks]
        largest = functools.reduce(jnp.maximum, magnitudes)
        absmax = jnp.max(jnp.max(largest, axis=1))
        # As an array, because only an array's reciprocal can be rounded to nearest.
        group_absmax = plgpu.layout_cast(jnp.full((at_once,), absmax), group_layout)
        nearer, reciprocal = blockwise.factors(
            group_absmax, functools.partial(invert, layout=group_layout)
        )
        for chunk in chunks:
            # Read again, from the cache: registers do not hold a whole long row.
            values = read(chunk)
            scaled = _inliers(values, outlier_threshold)
            for factor in (nearer, 127.0 * reciprocal):
                scaled *= jax.lax.broadcast_in_dim(factor, scaled.shape, (0,))
            codes = jnp.round(scaled).astype(jnp.int8)
            masks = [
                pallas.load(r.at[matrix, row_set, chunk], layout) for r in kept_refs
            ]
            for kept in masks:
                codes &= kept
            if is_permuted:
                codes = fragments.permuted(codes, 4)
            pallas.store(codes_ref.at[matrix, row, chunk], codes)
            for ref, kept in zip(outliers_refs, masks, strict=False):
                outliers = jnp.where(kept == 0, values, 0.0).astype(outlier_dtype)
                pallas.store(
                    ref.at[matrix, row, chunk], fragments.permuted(outliers, 2)
                )
        scale_ref[matrix, row] = absmax

    dtypes = [jnp.dtype(jnp.int8)]
    if columns is not None and outlier_dtype is not None:
        dtypes += [outlier_dtype]
    shape = (count, rows, groups, fragments.GROUP)
    *in_columns, scale = pallas.kernel(
        quantize_rows,
        out_type=[
            *(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes),
            jax.ShapeDtypeStruct((count, rows), jnp.float32),
        ],
        # The last axis is CUDA's first, and only that one may exceed 65,535.
        grid={"matrix": count, "row": rows},
    )(in_groups(x.reshape(count, sets * m, k)), *masks)
    codes, *outliers = (a.reshape(count, rows, size)[..., :k] for a in in_columns)
    return codes, scale, *outliers


def _inliers(values, outlier_threshold):
    if not outlier_threshold:
        return values
    return jnp.where(jnp.abs(values) >= outlier_threshold, 0.0, values)
