"""The product across the rows of a 4-bit matrix, ``x @ W``, in one pass over its codes.

This is the gradient of ``x @ W.T``. The kernel computes W's transpose times x's, with
the left operand in registers. A lane holds pairs of neighbours along the sum, which are
rows of W here, while codes lie in bytes along the other axis. So a lane reads the same
few bytes of each row that it holds, and interleaves two rows before it decodes them, at
an eighth of an instruction a weight. The kernel may choose which columns of W a lane
reads. It takes neighbours, so that reads and writes are contiguous. x stays as it is.

The absmax of a block belongs to one row of W. It cannot scale a sum, only levels, in 16
bits, which costs half an instruction a weight.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels._mosaic_gpu import double_quant, layouts, pallas
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_forward as forward
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_blockwise import (
    mosaic_gpu_kernel_gradient_fragments as across,
)
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES

# Rows of W that are decoded at a time: registers do not hold the levels of more.
STEP = 32
# Fewest rows of W in a part. Their codes take as many bytes as 16 rows of float32 sums
# that are written and read again.
LEAST_ROWS = 256
# For more rows of x, tiles have fewer columns, so that registers hold all sums.
MOST_WIDE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is divided.

    Let u be the unit roundoff of ``compute_dtype``, and T the sum of abs(x W) over the
    rows of W. The error is at most (3 u + 3 u^2 + u^3) T, besides the errors of a sum
    in float32 and of rounding the result. The forward kernel's ``Config`` has the same
    bound where absmax scales levels, also in float16.

    Attributes:
        block_m: rows of x a tile: 8, 16, 32, 64 or 128.
        block_n: columns of W a tile: 128 or 256.
        block_k: rows of W that are multiplied while the next are read: 64 or 128.
        split_k: parts that the rows of W are divided into, summed afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int


def heuristic(m: int, rows: int, size: int, count: int = 1) -> Config:
    """Divides ``count`` products, x ``(m, rows)`` by W ``(rows, size)``: unmeasured."""
    block_m = min(128, max(8, 2 ** math.ceil(math.log2(m))))
    is_wide = block_m <= MOST_WIDE_TOKENS and size % 256 == 0
    block_n = 256 if is_wide else 128
    # Registers hold the sums and the next rows of x.
    block_k = 128 if block_m <= 64 else 64
    tiles = count * math.ceil(m / block_m) * (size // block_n)
    most = max(1, rows // LEAST_ROWS)
    split_k = min(most, max(1, forward.CONCURRENT_TILES // tiles))
    return Config(block_m, block_n, block_k, split_k)


def multiply(
    x: Float[Array, "count m rows"],
    codes: UInt8[Array, "count rows half"],
    absmax: Float32[Array, "count rows blocks"] | UInt8[Array, "count rows blocks"],
    nested: Sequence[Float32[Array, "count 1 entries"]],
    levels: Float32[np.ndarray, "16"],
    block_size: int,
    config: Config,
    out_dtype: np.dtype,
) -> Float[Array, "count m size"]:
    """Multiplies each x with its W.

    Args:
        x: bfloat16 or float16 array; the levels are rounded to its dtype.
        codes: two codes per byte, the first in its high half; W's row size is a
            multiple of ``config.block_n``.
        absmax: absmax of blocks along W's rows.
        nested: nested absmax and offset, if any; a row for each matrix.
        levels: levels of the codebook.
        block_size: power of two, at least 32.
        config: division of the product.
        out_dtype: dtype of the result.
    """
    (count, m, _), half, dtype = x.shape, codes.shape[-1], x.dtype
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    size, splits = 2 * half, config.split_k
    codes, absmax = fragments.with_rows(block_k, codes, absmax)
    n = codes.shape[1]
    tiles = math.ceil(n / block_k)
    x = with_zeros(x, m + -m % block_m, n, block_k)
    # Blocks side by side in a tile.
    entries = max(1, block_n // block_size)
    blocks = absmax.shape[-1]
    absmax_layout = fragments.absmax_layout(block_k, entries)
    x_layout = layouts.x_layout(block_k, STEP)
    steps = range(block_k // STEP)

    def matmul_blockwise(table_ref, codes_ref, absmax_ref, x_ref, *refs):
        *nested_refs, out_ref, x_tiles, scale_tiles = refs
        matrix = jax.lax.axis_index("matrix")
        part = jax.lax.axis_index("part")
        tokens = pl.ds(jax.lax.axis_index("m") * block_m, block_m)
        column = jax.lax.axis_index("n") * block_n
        table = NIBBLES.hold(table_ref)
        decode = double_quant.decoder(nested_refs, matrix, blocks, absmax_layout)

        def row_of(tile):
            # The last tile overlaps the one before it, with zeros in x.
            return jnp.minimum(tile * block_k, n - block_k)

        def read(tile):
            row = row_of(tile)
            stored = pl.ds(column // 2, block_n // 2)
            held = tuple(
                pallas.load(
                    codes_ref.at[matrix, pl.ds(row + step * STEP, STEP), stored],
                    across.across_layout(block_n),
                )
                for step in steps
            )
            at_tile = pl.ds(row, block_k), pl.ds(column // block_size, entries)
            absmax = pallas.load(absmax_ref.at[matrix, *at_tile], absmax_layout)
            columns = pl.ds(tile * block_k, block_k)
            return held, (
                absmax,
                pallas.load(x_ref.at[matrix, tokens, columns], x_layout),
            )

        def decode_absmax(tile, absmax):
            return decode(absmax, row_of(tile) * blocks + column // block_size)

        def share(tile, slot, absmax, x):
            pallas.store(x_tiles.at[slot], x)
            scale = decode_absmax(tile, absmax).astype(dtype)
            fragments.share_absmax(scale_tiles.at[slot], scale, STEP)
            plgpu.commit_smem()

        def multiply_part(sums):
            def multiply(tile, codes, nothing):
                layout = across.scale_layout(entries, STEP)
                scale = pallas.load(scale_tiles.at[tile % 2], layout)
                for step in steps:
                    levels = across.decode_across(
                        codes[step], scale, step, table, across.across_layout(block_n)
                    )
                    rows = pl.ds(step * STEP, STEP)
                    plgpu.wgmma(sums, levels, x_tiles.at[tile % 2, :, rows].T)
                    # Waits before the registers of these levels hold others.
                    plgpu.wgmma_wait(0)
                return nothing

            first, last = part * tiles // splits, (part + 1) * tiles // splits
            forward.over_tiles(first, last, read, share, multiply, ())
            return sums[...]

        total = pl.run_scoped(
            multiply_part, plgpu.WGMMAAccumulatorRef((block_n, block_m))
        )
        out = out_ref.at[part, matrix, tokens, pl.ds(column, block_n)]
        pallas.store(out, across.in_order(total, out_ref.dtype))

    transforms = (
        plgpu.TilingTransform((8, STEP)),
        plgpu.SwizzleTransform(STEP * dtype.itemsize),
    )
    table = jnp.asarray(NIBBLES.table(levels, dtype))
    nested = double_quant.operands(nested, n * blocks)
    parts = pallas.kernel(
        matmul_blockwise,
        out_type=jax.ShapeDtypeStruct(
            (splits, count, x.shape[1], size),
            out_dtype if splits == 1 else jnp.float32,
        ),
        # Tiles of the same columns of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": size // block_n,
            "m": x.shape[1] // block_m,
        },
        scratch_types=(
            plgpu.SMEM((2, block_m, block_k), dtype, transforms=transforms),
            plgpu.SMEM((2, entries, block_k), dtype),
        ),
    )(table, codes, absmax, x, *nested)
    # The order of this sum is fixed, unlike that of atomic operations.
    return jnp.sum(parts, axis=0, dtype=parts.dtype)[:, :m].astype(out_dtype)


def with_zeros(
    x: Float[Array, "count m k"], padded_m: int, n: int, block_k: int
) -> Float[Array, "count padded_m tiles_k"]:
    """Returns x in whole tiles. The last tile begins with zeros.

    The zeros meet the rows of W that it shares with the tile before it.
    """
    _, m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, padded_m - m), (0, n - k)))
    whole = n // block_k * block_k
    zeros = [(0, 0), (0, 0), (-n % block_k, 0)]
    last = jnp.pad(x[..., whole:], zeros)
    return jnp.concatenate([x[..., :whole], last], axis=-1) if whole < n else x
