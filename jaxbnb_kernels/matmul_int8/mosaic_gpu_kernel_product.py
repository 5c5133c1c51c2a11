"""The int8 product, with outliers and scales, in one pass over W's codes.

For few rows of x, this takes as long as reading W. Codes go from memory to registers.
Without conversion, they are the left operand of the tensor cores: the kernel computes W
times x's transpose. x's codes are small, and lie in shared memory.

If a tile of columns has outliers, the kernel decodes its codes of W to 16 bits, in the
registers that hold them, and multiplies them again, with x's outliers. It does not read
W again or gather anything, and shapes do not depend on the number of outliers. A tile
without outliers costs one look at a flag.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from jaxbnb_kernels._mosaic_gpu import pallas
from jaxbnb_kernels._mosaic_gpu.instructions import elementwise
from jaxbnb_kernels._mosaic_gpu.layouts import apart, x_layout
from jaxbnb_kernels._tiles import PRODUCT_COLUMNS as COLUMNS
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_int8 import reference

# For larger tiles, a warpgroup's registers do not hold both the sums of integers and
# those of outliers, 64 of each per thread.
MOST_ROWS, MOST_TOKENS = 128, 64
# Tiles that run at once: two warpgroups on each multiprocessor of an H100 or H200.
CONCURRENT_TILES = 2 * 132
# Fewest tiles of columns in a part of a row. Each part waits for its first tile.
LEAST_TILES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is divided.

    Sums of integers are exact, and scaled as in the specification.

    Attributes:
        block_m: rows of x a tile: 8, 16, 32 or 64.
        block_n: rows of W a tile: 64 or 128.
        split_k: parts that the columns are divided into, summed afterwards.
    """

    block_m: int
    block_n: int
    split_k: int


def heuristic(m: int, n: int, k: int, count: int = 1) -> Config:
    """Divides ``count`` products of x ``(m, k)`` and W ``(n, k)``: not measured."""
    block_m = min(MOST_TOKENS, max(8, 2 ** math.ceil(math.log2(m))))
    block_n = 64 if n < MOST_ROWS else MOST_ROWS
    tiles = count * math.ceil(m / block_m) * math.ceil(n / block_n)
    most = max(1, k // (LEAST_TILES * COLUMNS))
    split_k = min(most, max(1, CONCURRENT_TILES // tiles))
    return Config(block_m, block_n, split_k)


@dataclasses.dataclass(frozen=True)
class Outliers:
    """The outliers of x, as the kernel takes them.

    Attributes:
        x: ``(count, rows, k)``, bfloat16 or float16; permuted, and zero except in
            outlier columns.
        flags: ``(count, k / COLUMNS)``: 1 if a tile of columns has outliers, else 0.
    """

    x: Float[Array, "count rows k"]
    flags: Int32[Array, "count tiles"]


def multiply(
    x_codes: Int8[Array, "count rows k"],
    row_scale: Float32[Array, "count rows"],
    outliers: Outliers | None,
    codes: Int8[Array, "count n k"],
    col_scale: Float32[Array, "count n"],
    m: int,
    config: Config,
    out_dtype: np.dtype,
) -> Float[Array, "count m n"]:
    """Multiplies each x with the transpose of its W.

    Args:
        x_codes: permuted codes of ``m`` rows, and of further rows that fill the last
            tile.
        row_scale: scales of x's rows.
        outliers: outliers of x, or None.
        codes: codes of W; k is a multiple of ``COLUMNS``.
        col_scale: scales of W's rows.
        m: rows of x.
        config: division of the product.
        out_dtype: dtype of the result.
    """
    (count, padded_m, k), n = x_codes.shape, codes.shape[1]
    has_outliers = outliers is not None
    block_m, block_n, splits = config.block_m, config.block_n, config.split_k
    tiles = k // COLUMNS
    # Copies only small arrays, or nothing.
    missing = max(0, block_n - n)
    codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)))
    col_scale = jnp.pad(col_scale, ((0, 0), (0, missing)))
    # Operands of this kernel, in the order of their first use.
    operands = {"codes": codes, "x": x_codes}
    if outliers is not None:
        operands |= {"flags": outliers.flags, "outliers": outliers.x}
    if has_outliers or splits == 1:
        operands |= {"col_scale": col_scale}
    if splits == 1:
        operands |= {"row_scale": row_scale}
    sum_dtypes = [jnp.int32, jnp.float32][: 1 + has_outliers]
    out_dtypes = [out_dtype] if splits == 1 else sum_dtypes
    # Rows of W are rows of the sums, rows of x their columns.
    row_layout, column_layout = (plgpu.Layout.WGMMA.reduce((axis,)) for axis in (1, 0))

    def matmul_int8(*refs):
        ref_of = dict(zip(operands, refs, strict=False))
        out_refs = refs[len(operands) :][: len(out_dtypes)]
        x_tiles, *outlier_tile = refs[len(operands) + len(out_dtypes) :]
        matrix = jax.lax.axis_index("matrix")
        part = jax.lax.axis_index("part")
        tokens = pl.ds(jax.lax.axis_index("m") * block_m, block_m)
        # The last tile overlaps the one before it instead of ending early. Both write
        # the same values.
        row = jnp.minimum(jax.lax.axis_index("n") * block_n, n + missing - block_n)
        rows = pl.ds(row, block_n)
        first, last = part * tiles // splits, (part + 1) * tiles // splits

        def read(tile):
            columns = pl.ds(tile * COLUMNS, COLUMNS)
            w_ref, x_ref = ref_of["codes"], ref_of["x"]
            w = pallas.load(w_ref.at[matrix, rows, columns], fragments.codes_layout())
            x = pallas.load(
                x_ref.at[matrix, tokens, columns], x_layout(COLUMNS, COLUMNS)
            )
            flag = ref_of["flags"][matrix, tile] if has_outliers else 0
            return w, x, flag

        def share(ref, values):
            pallas.store(ref, values)
            plgpu.commit_smem()

        def read_col_scale():
            return pallas.load(ref_of["col_scale"].at[matrix, rows], row_layout)

        def add_outliers(tile, w, sums):
            (shared,) = outlier_tile
            x_ref = ref_of["outliers"].at[
                matrix, tokens, pl.ds(tile * COLUMNS, COLUMNS)
            ]
            # No warp still multiplies with the previous one: there was a barrier since.
            share(shared, pallas.load(x_ref, x_layout(COLUMNS, fragments.STEP)))
            # Rounded to nearest, unlike a division in Pallas.
            divide = "div.rn.f32 $0, $1, 0f42FE0000;"
            scale = elementwise(divide, read_col_scale(), row_layout)
            for step in range(COLUMNS // fragments.STEP):
                levels = fragments.decode(w, scale, step, x_ref.dtype)
                columns = pl.ds(step * fragments.STEP, fragments.STEP)
                plgpu.wgmma(sums, levels, shared.at[:, columns].T)
                # Waits before the registers of these levels hold others.
                plgpu.wgmma_wait(0)

        def over_tiles(*sums):
            def step(tile, carry):
                w, flag = carry
                # The last tile is read again, from the cache.
                w_ahead, x_ahead, flag_ahead = read(jnp.minimum(tile + 1, last - 1))
                plgpu.wgmma(sums[0], fragments.as_operand(w), x_tiles.at[tile % 2].T)
                plgpu.wgmma_wait(0)
                if has_outliers:
                    # The body runs once or never.
                    jax.lax.fori_loop(
                        0,
                        flag,
                        lambda *_: add_outliers(tile, w, sums[1]),
                        None,
                    )
                # No warp still multiplies with that slot: there was a barrier since.
                share(x_tiles.at[1 - tile % 2], x_ahead)
                return w_ahead, flag_ahead

            w, x, flag = read(first)
            share(x_tiles.at[first % 2], x)
            jax.lax.fori_loop(first, last, step, (w, flag))
            return [ref[...] for ref in sums]

        sums = pl.run_scoped(
            over_tiles,
            *(plgpu.WGMMAAccumulatorRef((block_n, block_m), t) for t in sum_dtypes),
        )
        if splits == 1:
            col_scale = read_col_scale()
            row_scale = pallas.load(
                ref_of["row_scale"].at[matrix, tokens], column_layout
            )
            y = _rescale(sums[0], row_scale, col_scale)
            sums = [y + sums[1] if has_outliers else y]
        for ref, values in zip(out_refs, sums, strict=True):
            out = ref.at[part, matrix, tokens, rows].T
            pallas.store(out, apart(values).astype(ref.dtype))

    def tile_of(slots, width, dtype):
        transforms = (
            plgpu.TilingTransform((8, width)),
            plgpu.SwizzleTransform(width * dtype.itemsize),
        )
        return plgpu.SMEM((*slots, block_m, COLUMNS), dtype, transforms=transforms)

    scratch = [tile_of((2,), COLUMNS, x_codes.dtype)]
    if outliers is not None:
        scratch += [tile_of((), fragments.STEP, outliers.x.dtype)]
    padded_n = codes.shape[1]
    parts = pallas.kernel(
        matmul_int8,
        out_type=[
            jax.ShapeDtypeStruct((splits, count, padded_m, padded_n), dtype)
            for dtype in out_dtypes
        ],
        # Tiles of the same rows of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": math.ceil(padded_n / block_n),
            "m": padded_m // block_m,
        },
        scratch_types=tuple(scratch),
    )(*operands.values())
    # The order of this sum is fixed, unlike that of atomic operations.
    y, *outlier_sums = (jnp.sum(p, axis=0, dtype=p.dtype) for p in parts)
    if splits > 1:
        y = reference.rescale(y, row_scale, col_scale[:, None])
        y = sum(outlier_sums, start=y).astype(out_dtype)
    return y[:, :m, :n]


def _rescale(sums, row_scale, col_scale):
    """Does the same as `reference.rescale`, for transposed sums."""
    row_scale = jax.lax.broadcast_in_dim(row_scale, sums.shape, (1,))
    col_scale = jax.lax.broadcast_in_dim(col_scale, sums.shape, (0,))
    return sums.astype(jnp.float32) * (row_scale * col_scale) * reference.UNIT
