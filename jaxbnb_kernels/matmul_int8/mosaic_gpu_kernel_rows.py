"""The rows of x quantised in one pass over memory, for Hopper GPUs.

A warpgroup takes a row: once for its largest magnitude, and once more, from its cache,
for its codes. That moves 3 bytes an element of 16 bits, where XLA takes two passes and
moves 5. Which columns have outliers depends on all rows: XLA has found them before.
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

# Columns at a time; shorter rows are filled up.
CHUNK = 2048


def quantize(
    x: Float[Array, "count sets m k"],
    columns: Bool[Array, "count sets k"] | None,
    outlier_threshold: float,
    outlier_dtype: np.dtype | None,
    rows: int,
) -> tuple[Array, ...]:
    """The codes and scales of `reference.quantize_inliers`, and the outliers.

    Args:
        x: sets of rows, each with outlier columns of its own; k is a multiple of 64.
        columns: outlier columns; None if the threshold is 0.
        outlier_threshold: magnitude at which an element stays out of its row's scale.
        outlier_dtype: permute the columns for `fused.multiply`, and also return x in
            columns of outliers, zero elsewhere, rounded to that; or None.
        rows: number of result rows; those beyond x repeat its last row.

    Returns:
        int8 ``(count, rows, k)``, float32 ``(count, rows)``, and, if there are columns
        and a dtype, that of ``(count, rows, k)``.
    """
    count, sets, m, k = x.shape
    size = max(k, CHUNK)
    groups, at_once = size // fragments.GROUP, CHUNK // fragments.GROUP
    # The last chunk overlaps the one before it rather than end early.
    chunks = [
        pl.ds(min(i * at_once, groups - at_once), at_once)
        for i in range(math.ceil(groups / at_once))
    ]

    def in_groups(array):
        filled = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - k)])
        return filled.reshape(*array.shape[:-1], groups, fragments.GROUP)

    layout = fragments.row_layout()
    of_group = layout.reduce((1,))
    is_permuted = outlier_dtype is not None
    masks = [] if columns is None else [jnp.where(columns, 0, -1).astype(jnp.int8)]
    masks, num_masks = [in_groups(mask) for mask in masks], len(masks)

    def quantize_rows(x_ref, *refs):
        kept_refs, refs = refs[:num_masks], refs[num_masks:]
        codes_ref, *outliers_refs, scale_ref = refs
        of, row = jax.lax.axis_index("matrix"), jax.lax.axis_index("row")
        of_x = jnp.minimum(row, sets * m - 1)
        the_set = of_x // m

        def read(chunk):
            values = pallas.load(x_ref.at[of, of_x, chunk], layout)
            return values.astype(jnp.float32)

        magnitudes = [jnp.abs(_inliers(read(c), outlier_threshold)) for c in chunks]
        largest = functools.reduce(jnp.maximum, magnitudes)
        absmax = jnp.max(jnp.max(largest, axis=1))
        # As an array, because only an array's reciprocal can be rounded to nearest.
        of_groups = plgpu.layout_cast(jnp.full((at_once,), absmax), of_group)
        nearer, reciprocal = blockwise.factors(
            of_groups, functools.partial(invert, layout=of_group)
        )
        for chunk in chunks:
            # Again, from nearby: registers do not hold every row.
            values = read(chunk)
            scaled = _inliers(values, outlier_threshold)
            for factor in (nearer, 127.0 * reciprocal):
                scaled *= jax.lax.broadcast_in_dim(factor, scaled.shape, (0,))
            codes = jnp.round(scaled).astype(jnp.int8)
            masks = [pallas.load(r.at[of, the_set, chunk], layout) for r in kept_refs]
            for kept in masks:
                codes &= kept
            if is_permuted:
                codes = fragments.permuted(codes, 4)
            pallas.store(codes_ref.at[of, row, chunk], codes)
            for ref, kept in zip(outliers_refs, masks, strict=False):
                outliers = jnp.where(kept == 0, values, 0.0).astype(outlier_dtype)
                pallas.store(ref.at[of, row, chunk], fragments.permuted(outliers, 2))
        scale_ref[of, row] = absmax

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
        # The last axis is CUDA's first, the only one that may exceed 65,535.
        grid={"matrix": count, "row": rows},
    )(in_groups(x.reshape(count, sets * m, k)), *masks)
    codes, *outliers = (a.reshape(count, rows, size)[..., :k] for a in in_columns)
    return codes, scale, *outliers


def _inliers(values, outlier_threshold):
    if not outlier_threshold:
        return values
    return jnp.where(jnp.abs(values) >= outlier_threshold, 0.0, values)
