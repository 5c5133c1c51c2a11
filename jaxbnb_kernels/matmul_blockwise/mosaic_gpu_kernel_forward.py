"""The product with a 4-bit matrix in one pass over its codes.

For few rows of x, ``x @ W.T`` takes as long as reading W. So codes go straight to
registers, become 16-bit levels there, and are the left operand of the tensor cores
without moving: the kernel computes W times x's transpose. x is small and lies in shared
memory. Its columns are permuted to the order in which registers hold the codes.

The levels are the codebook's, rounded to 16 bits. A block's absmax multiplies the
block's own sum, in float32. In tiles of more than ``MOST_FOLDED_TOKENS``, registers
cannot hold the sums twice, so the absmax multiplies the 16-bit levels. `Config` states
the error bounds.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels._mosaic_gpu import double_quant, layouts, pallas
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES

# For larger tiles, a warpgroup's registers hold the sums once, not twice.
MOST_FOLDED_TOKENS = 64
# Tiles that run at once: two warpgroups on each multiprocessor of an H100 or H200.
CONCURRENT_TILES = 2 * 132
# Fewest tiles of columns in a part of a row. Each part waits for its first tile.
LEAST_TILES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is divided.

    Let u be the unit roundoff of ``compute_dtype``, 2^-8 in bfloat16 and 2^-11 in
    float16, and T the sum of abs(x W) over a row. A sum in float32 has an error of
    K 2^-24 T, and the result is rounded. Besides these, the error is at most u T if
    absmax is folded into sums. If absmax scales levels, it is at most
    (3 u + 3 u^2 + u^3) T, because levels, absmax, and their product are rounded. In
    float16, small numbers are subnormal, which adds 2^-24 of the sum of abs(x), and an
    absmax beyond 65,504 is infinite.

    Attributes:
        block_m: rows of x a tile: 8, 16, 32, 64 or 128.
        block_n: rows of W a tile: 64 or 128.
        block_k: columns of both that are multiplied while the next are read.
        split_k: parts that the columns are divided into, summed afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int

    @property
    def folds_absmax(self) -> bool:
        """Whether absmax is applied to sums, not to levels."""
        return self.block_m <= MOST_FOLDED_TOKENS


def heuristic(m: int, n: int, k: int, count: int = 1) -> Config:
    """Divides ``count`` products of x ``(m, k)`` and W ``(n, k)``: not measured."""
    block_m = min(128, max(8, 2 ** math.ceil(math.log2(m))))
    block_n = 64 if n < 128 else 128
    # Registers hold the sums and the next columns of both operands.
    block_k = 128 if block_m <= 32 else 64
    tiles = count * math.ceil(m / block_m) * math.ceil(n / block_n)
    most = max(1, k // (LEAST_TILES * block_k))
    split_k = min(most, max(1, CONCURRENT_TILES // tiles))
    return Config(block_m, block_n, block_k, split_k)


def over_tiles(
    first: Any,
    last: Any,
    read: Callable[[Any], tuple[Any, Sequence[Any]]],
    share: Callable[..., None],
    multiply: Callable[[Any, Any, Any], Any],
    sums: Any,
) -> Any:
    """Calls ``multiply`` for each tile from ``first`` on, while it reads the next one.

    Args:
        first: number of the first tile.
        last: number of the last tile, plus one.
        read: function of a tile's number that returns values to hold in registers and
            values to share.
        share: function ``share(tile, slot, *shared)`` that writes values into one of
            two slots of shared memory, and ends with a barrier.
        multiply: function of ``(tile, held, sums)`` that returns the next sums.
        sums: initial sums.
    """

    def step(tile, carry):
        held, sums = carry
        # The last tile is read again, from the cache.
        following = jnp.minimum(tile + 1, last - 1)
        ahead, shared_ahead = read(following)
        sums = multiply(tile, held, sums)
        # No warp still multiplies with that slot: there was a barrier since.
        share(following, 1 - tile % 2, *shared_ahead)
        return ahead, sums

    held, shared = read(first)
    share(first, first % 2, *shared)
    return jax.lax.fori_loop(first, last, step, (held, sums))[-1]


def multiply(
    x: Float[Array, "count m k"],
    codes: UInt8[Array, "count n half"],
    absmax: Float32[Array, "count n blocks"] | UInt8[Array, "count n blocks"],
    nested: Sequence[Float32[Array, "count 1 entries"]],
    levels: Float32[np.ndarray, "16"],
    block_size: int,
    config: Config,
    out_dtype: np.dtype,
) -> Float[Array, "count m n"]:
    """Multiplies each x with the transpose of its W.

    Args:
        x: bfloat16 or float16 array; the levels are rounded to its dtype.
        codes: two codes per byte, the first in its high half; k is a multiple of
            ``PRODUCT_COLUMNS``.
        absmax: absmax of blocks along k.
        nested: nested absmax and offset, if any; a row for each matrix.
        levels: levels of the codebook.
        block_size: power of two, at least 32.
        config: division of the product.
        out_dtype: dtype of the result.
    """
    (count, m, k), n, dtype = x.shape, codes.shape[1], x.dtype
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles, splits = k // block_k, config.split_k
    # Columns of one block, or as many as lanes read at once.
    group = min(block_size, block_k)
    groups = range(block_k // group)
    # Copies only small arrays, or nothing.
    x = fragments.permute(jnp.pad(x, ((0, 0), (0, -m % block_m), (0, 0))), group)
    codes, absmax = fragments.with_rows(block_n, codes, absmax)
    padded_n = codes.shape[1]
    blocks = absmax.shape[-1]
    absmax_layout = fragments.absmax_layout(block_n, len(groups))
    rows_layout = plgpu.Layout.WGMMA.reduce((1,))
    # Shared memory is laid out in tiles of 8 rows and ``width`` columns.
    width = min(group, 64)
    x_layout = layouts.x_layout(block_k, width)

    def matmul_blockwise(table_ref, codes_ref, absmax_ref, x_ref, *refs):
        *nested_refs, out_ref, x_tiles, absmax_tiles = refs
        matrix = jax.lax.axis_index("matrix")
        part = jax.lax.axis_index("part")
        tokens = pl.ds(jax.lax.axis_index("m") * block_m, block_m)
        # The last tile overlaps the one before it instead of ending early. Both write
        # the same values.
        row = jnp.minimum(jax.lax.axis_index("n") * block_n, padded_n - block_n)
        rows = pl.ds(row, block_n)
        table = NIBBLES.hold(table_ref)

        decode = double_quant.decoder(nested_refs, matrix, blocks, absmax_layout)

        def read_x(tile):
            columns = pl.ds(tile * block_k, block_k)
            return pallas.load(x_ref.at[matrix, tokens, columns], x_layout)

        def share(tile, slot, absmax, x):
            pallas.store(x_tiles.at[slot], x)
            # One thread has read the absmax of each row of W, and four threads need it.
            # At the barrier before this, the compiler does not wait for pending reads.
            fragments.share_absmax(absmax_tiles.at[slot], decode_absmax(tile, absmax))
            plgpu.commit_smem()

        def read_codes(tile):
            half = group // 2
            starts = [tile * (block_k // 2) + g * half for g in groups]
            group_refs = [
                codes_ref.at[matrix, rows, pl.ds(start, half)] for start in starts
            ]
            layout = fragments.codes_layout(group // 2)
            return tuple(pallas.load(ref, layout) for ref in group_refs)

        def read_absmax(tile):
            columns = pl.ds(tile * block_k // block_size, len(groups))
            return pallas.load(absmax_ref.at[matrix, rows, columns], absmax_layout)

        def decode_absmax(tile, absmax):
            return decode(absmax, row * blocks + tile * block_k // block_size)

        def absmax_of(tile, g):
            return pallas.load(absmax_tiles.at[tile % 2, g], rows_layout)

        def wgmma(sums, levels, tile, g):
            columns = x_tiles.at[tile % 2, :, pl.ds(g * group, group)]
            plgpu.wgmma(sums, levels, columns.T)

        def read(tile):
            # Codes come first, because they are the most data.
            return read_codes(tile), (read_absmax(tile), read_x(tile))

        first, last = part * tiles // splits, (part + 1) * tiles // splits

        def fold_absmax(tile, codes, total):
            for g in groups:
                absmax = absmax_of(tile, g)
                levels = fragments.decode(codes[g], table, dtype)

                def multiply_group(sums, levels=levels, g=g):
                    wgmma(sums, levels, tile, g)
                    return sums[...]

                sums = pl.run_scoped(multiply_group, accumulator)
                total += sums * jax.lax.broadcast_in_dim(absmax, sums.shape, (0,))
            return total

        def scale_levels(sums):
            def multiply(tile, codes, nothing):
                for g in groups:
                    levels = fragments.decode(codes[g], table, dtype)
                    scale = absmax_of(tile, g).astype(dtype)
                    levels *= jax.lax.broadcast_in_dim(scale, levels.shape, (0,))
                    wgmma(sums, levels, tile, g)
                    # Waits before the registers of these levels hold others.
                    plgpu.wgmma_wait(0)
                return nothing

            over_tiles(first, last, read, share, multiply, ())
            return sums[...]

        accumulator = plgpu.WGMMAAccumulatorRef((block_n, block_m))
        if config.folds_absmax:
            zeros = jnp.zeros((block_n, block_m), jnp.float32)
            total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            total = over_tiles(first, last, read, share, fold_absmax, total)
        else:
            total = pl.run_scoped(scale_levels, accumulator)
        out = out_ref.at[part, matrix, tokens, rows].T
        pallas.store(out, layouts.apart(total).astype(out_ref.dtype))

    transforms = (
        plgpu.TilingTransform((8, width)),
        plgpu.SwizzleTransform(width * dtype.itemsize),
    )
    table = jnp.asarray(NIBBLES.table(levels, dtype))
    nested = double_quant.operands(nested, padded_n * blocks)
    padded_m = x.shape[1]
    parts = pallas.kernel(
        matmul_blockwise,
        out_type=jax.ShapeDtypeStruct(
            (splits, count, padded_m, padded_n),
            out_dtype if splits == 1 else jnp.float32,
        ),
        # Tiles of the same rows of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": math.ceil(padded_n / block_n),
            "m": padded_m // block_m,
        },
        scratch_types=(
            plgpu.SMEM((2, block_m, block_k), dtype, transforms=transforms),
            plgpu.SMEM((2, len(groups), block_n), jnp.float32),
        ),
    )(table, codes, absmax, x, *nested)
    # The order of this sum is fixed, unlike that of atomic operations.
    return jnp.sum(parts, axis=0, dtype=parts.dtype)[:, :m, :n].astype(out_dtype)
