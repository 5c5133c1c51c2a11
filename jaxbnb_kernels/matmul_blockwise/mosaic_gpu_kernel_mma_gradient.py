"""The product across the rows of a quantised matrix, for warps that multiply alone.

Like `mosaic_gpu_kernel_gradient`, this decodes two rows of W together, to pairs along
the sum. ``mma.sync`` takes both operands from registers. Only the absmax, and the
levels of 8-bit codes, lie in shared memory: one thread reads or decodes the absmax of
a row, and eight need them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._mosaic_gpu import double_quant, memory, pallas
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_blockwise import (
    mosaic_gpu_kernel_gradient_fragments as across,
)
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_fragments as of_warps
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_forward import (
    over_tiles,
)
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_gradient import (
    LEAST_ROWS,
    Config,
    with_zeros,
)
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import (
    NIBBLES,
    Levels,
    Lookup,
)


def heuristic(
    m: int, rows: int, size: int, count: int = 1, lookup: Lookup = NIBBLES
) -> Config:
    """Divides ``count`` products, x ``(m, rows)`` by W ``(rows, size)``: unmeasured."""
    # More rows of x would not leave registers for the next tile.
    block_m = min(32, max(8, 2 ** math.ceil(math.log2(m))))
    # Four bytes of codes a lane, if possible.
    block_n = 256 if size % 256 == 0 and lookup is NIBBLES else 128
    # Registers hold the sums and the next rows of both operands.
    block_k = 128 if block_m <= 8 else 64
    tiles = count * math.ceil(m / block_m) * (size // block_n)
    most = max(1, rows // LEAST_ROWS)
    at_once = target().at_once(of_warps.CONCURRENT_TILES, lookup.shared_bytes)
    split_k = min(most, max(1, at_once // tiles))
    return Config(block_m, block_n, block_k, split_k)


def multiply(
    x: Float[Array, "count m rows"],
    codes: UInt8[Array, "count rows stored"],
    absmax: Float32[Array, "count rows blocks"] | UInt8[Array, "count rows blocks"],
    nested: Sequence[Float32[Array, "count 1 entries"]],
    levels: Levels,
    block_size: int,
    config: Config,
    out_dtype: np.dtype,
    tiles_of_x: Int32[Array, "tiles 3"] | None = None,
) -> Float[Array, "count m size"]:
    """Multiplies each x with its W.

    The arguments are those of `mosaic_gpu_kernel_gradient.multiply`, but codes may have
    8 bits. With ``tiles_of_x``, there is one x, and each of its tiles has its own W;
    see `mosaic_gpu_kernel_mma_fragments.Tiles`.
    """
    lookup, of_x = levels.lookup, of_warps.Tiles(tiles_of_x, config.block_m)
    (count, m, _), dtype = x.shape, x.dtype
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    size, splits = lookup.per_byte * codes.shape[-1], config.split_k
    codes, absmax = fragments.with_rows(block_k, codes, absmax)
    n = codes.shape[1]
    tiles = math.ceil(n / block_k)
    x = with_zeros(x, m + of_x.padding(m), n, block_k)
    # Blocks side by side in a tile.
    entries = max(1, block_n // block_size)
    blocks = absmax.shape[-1]
    absmax_layout = fragments.absmax_layout(block_k, entries)
    stored = block_n // lookup.per_byte
    codes_layout = of_warps.codes_layout(stored)
    steps = range(block_k // of_warps.STEP)

    def matmul_blockwise(table_ref, codes_ref, absmax_ref, x_ref, *refs):
        tile_refs, refs = refs[: len(of_x.operands)], refs[len(of_x.operands) :]
        nested_refs, refs = refs[: len(nested)], refs[len(nested) :]
        out_ref, scale_tiles, *shared = refs
        part = jax.lax.axis_index("part")
        x_matrix, matrix, token, end = of_x.place(*tile_refs, m=m)
        tokens = pl.ds(token, block_m)
        column = jax.lax.axis_index("n") * block_n
        table = lookup.hold(table_ref, *shared)
        decode = double_quant.decoder(nested_refs, matrix, blocks, absmax_layout)

        def row_of(tile):
            # The last tile overlaps the one before it, with zeros in x.
            return jnp.minimum(tile * block_k, n - block_k)

        def read(tile):
            row, at = row_of(tile), tile * block_k
            columns = pl.ds(column // lookup.per_byte, stored)

            def rows_from(start, step):
                return pl.ds(start + step * of_warps.STEP, of_warps.STEP)

            code_refs = [
                codes_ref.at[matrix, rows_from(row, step), columns] for step in steps
            ]
            x_refs = [x_ref.at[x_matrix, tokens, rows_from(at, step)] for step in steps]
            at_tile = pl.ds(row, block_k), pl.ds(column // block_size, entries)
            # Codes come first, because they are the most data.
            codes = [pallas.load(ref, codes_layout) for ref in code_refs]
            absmax = pallas.load(absmax_ref.at[matrix, *at_tile], absmax_layout)
            x_layout = of_warps.x_layout(of_warps.STEP)
            return (codes, [pallas.load(ref, x_layout) for ref in x_refs]), (absmax,)

        def decode_absmax(tile, absmax):
            absmax = decode(absmax, row_of(tile) * blocks + column // block_size)
            return levels.in_units(absmax)

        def share(tile, slot, absmax):
            scale = decode_absmax(tile, absmax).astype(dtype)
            fragments.share_absmax(scale_tiles.at[slot], scale)
            memory.barrier()

        def multiply(tile, held, sums):
            layout = across.scale_layout(entries, of_warps.STEP)
            scale = pallas.load(scale_tiles.at[tile % 2], layout)
            for step, (codes, x) in enumerate(zip(*held, strict=True)):
                decoded = across.decode_across(
                    codes, scale, step, table, codes_layout, lookup
                )
                sums = of_warps.add_product(sums, decoded, x)
            return sums

        first, last = part * tiles // splits, (part + 1) * tiles // splits
        last = of_x.last(first, last, token, end)
        zeros = jnp.zeros((block_n, block_m), jnp.float32)
        sums = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        sums = over_tiles(first, last, read, share, multiply, sums)
        out = out_ref.at[part, x_matrix, tokens, pl.ds(column, block_n)]
        layout = across.out_layout(block_n, out_ref.dtype)
        rows = across.in_order(sums, out_ref.dtype)
        # For a single row of x, eight would be a tenth of all bytes.
        memory.store_rows(out, rows, end - token, layout, pitch=size)

    table = jnp.asarray(lookup.table(levels.values, dtype))
    nested = double_quant.operands(nested, n * blocks)
    parts = pallas.kernel(
        matmul_blockwise,
        out_type=jax.ShapeDtypeStruct(
            (splits, count, m, size),
            out_dtype if splits == 1 else jnp.float32,
        ),
        # Tiles of the same columns of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": size // block_n,
            "m": of_x.count(m),
        },
        scratch_types=(plgpu.SMEM((2, entries, block_k), dtype), *lookup.scratch),
    )(table, codes, absmax, x, *of_x.operands, *nested)
    # The order of this sum is fixed, unlike that of atomic operations.
    return jnp.sum(parts, axis=0, dtype=parts.dtype).astype(out_dtype)
