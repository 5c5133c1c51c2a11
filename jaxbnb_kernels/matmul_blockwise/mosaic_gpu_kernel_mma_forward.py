"""The product with a quantised matrix on GPUs whose warps multiply by themselves.

Like `mosaic_gpu_kernel_forward`, this computes W times x's transpose in one pass over
W's codes, which become levels in registers. ``mma.sync`` takes both operands from
registers, so x is read there too, as often as there are warps; it is small, and comes
from a cache. Only the levels of 8-bit codes lie in shared memory, and warps do not wait
for each other. The absmax always scale sums: a group's are only four numbers at a time.
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
from jaxbnb_kernels._mosaic_gpu import double_quant, pallas
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_fragments as fragments
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_fragments as of_warps
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_forward import (
    LEAST_TILES,
    Config,
)
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import (
    NIBBLES,
    Levels,
    Lookup,
)


def heuristic(
    m: int, n: int, k: int, count: int = 1, lookup: Lookup = NIBBLES
) -> Config:
    """Divides ``count`` products of x ``(m, k)`` and W ``(n, k)``: not measured."""
    # More rows of x would not leave registers for the next tile.
    block_m = min(32, max(8, 2 ** math.ceil(math.log2(m))))
    block_n = 64 if n < 128 else 128
    # Registers hold the sums and the next columns of both operands.
    block_k = 128 if block_m <= 8 and lookup is NIBBLES else 64
    tiles = count * math.ceil(m / block_m) * math.ceil(n / block_n)
    most = max(1, k // (LEAST_TILES * block_k))
    at_once = target().at_once(of_warps.CONCURRENT_TILES, lookup.shared_bytes)
    split_k = min(most, max(1, at_once // tiles))
    return Config(block_m, block_n, block_k, split_k)


def multiply(
    x: Float[Array, "count m k"],
    codes: UInt8[Array, "count n stored"],
    absmax: Float32[Array, "count n blocks"] | UInt8[Array, "count n blocks"],
    nested: Sequence[Float32[Array, "count 1 entries"]],
    levels: Levels,
    block_size: int,
    config: Config,
    out_dtype: np.dtype,
    tiles_of_x: Int32[Array, "tiles 3"] | None = None,
) -> Float[Array, "count m n"]:
    """Multiplies each x with the transpose of its W.

    The arguments are those of `mosaic_gpu_kernel_forward.multiply`, but codes may have
    8 bits. With ``tiles_of_x``, there is one x, and each of its tiles has its own W;
    see `mosaic_gpu_kernel_mma_fragments.Tiles`.
    """
    lookup, of_x = levels.lookup, of_warps.Tiles(tiles_of_x, config.block_m)
    (count, m, k), n, dtype = x.shape, codes.shape[1], x.dtype
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles, splits = k // block_k, config.split_k
    # Columns of one block, or as many as lanes read at once.
    group = min(block_size, block_k)
    groups = range(block_k // group)
    # Copies only small arrays, or nothing.
    x = jnp.pad(x, ((0, 0), (0, of_x.padding(m)), (0, 0)))
    codes, absmax = fragments.with_rows(block_n, codes, absmax)
    padded_n = codes.shape[1]
    blocks = absmax.shape[-1]
    absmax_layout = of_warps.absmax_layout(len(groups))

    def matmul_blockwise(table_ref, codes_ref, absmax_ref, x_ref, *refs):
        tile_refs, refs = refs[: len(of_x.operands)], refs[len(of_x.operands) :]
        nested_refs, (out_ref, *shared) = refs[: len(nested)], refs[len(nested) :]
        part = jax.lax.axis_index("part")
        x_matrix, matrix, token, end = of_x.place(*tile_refs, m=m)
        tokens = pl.ds(token, block_m)
        # The last tile overlaps the one before it instead of ending early. Both write
        # the same values.
        row = jnp.minimum(jax.lax.axis_index("n") * block_n, padded_n - block_n)
        rows = pl.ds(row, block_n)
        decode = double_quant.decoder(nested_refs, matrix, blocks, absmax_layout)

        def read(tile):
            start, stored = tile * block_k, group // lookup.per_byte
            code_refs = [
                codes_ref.at[
                    matrix, rows, pl.ds(start // lookup.per_byte + g * stored, stored)
                ]
                for g in groups
            ]
            x_refs = [
                x_ref.at[x_matrix, tokens, pl.ds(start + g * group, group)]
                for g in groups
            ]
            columns = pl.ds(start // block_size, len(groups))
            return (
                [pallas.load(ref, fragments.codes_layout(stored)) for ref in code_refs],
                pallas.load(absmax_ref.at[matrix, rows, columns], absmax_layout),
                [pallas.load(ref, of_warps.x_layout(group)) for ref in x_refs],
            )

        def decode_absmax(tile, absmax):
            absmax = decode(absmax, row * blocks + tile * block_k // block_size)
            return levels.in_units(absmax)

        first, last = part * tiles // splits, (part + 1) * tiles // splits
        last = of_x.last(first, last, token, end)

        def step(tile, carry):
            (codes, absmax, x), sums = carry
            # The last tile is read again, from the cache.
            ahead = read(jnp.minimum(tile + 1, last - 1))
            absmax = decode_absmax(tile, absmax)
            for g in groups:
                decoded = fragments.decode(codes[g], table, dtype, lookup)
                sums = of_warps.add_product(sums, decoded, x[g], absmax, g)
            return ahead, sums

        zeros = jnp.zeros((block_n, block_m), jnp.float32)
        sums = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        first_tile = read(first)
        # The first codes are under way meanwhile.
        table = lookup.hold(table_ref, *shared)
        _, sums = jax.lax.fori_loop(first, last, step, (first_tile, sums))
        sums = sums.astype(out_ref.dtype)
        of_warps.store_tokens(out_ref.at[part, x_matrix], sums, token, row, end)

    table = jnp.asarray(lookup.table(levels.values, dtype))
    nested = double_quant.operands(nested, padded_n * blocks)
    parts = pallas.kernel(
        matmul_blockwise,
        out_type=jax.ShapeDtypeStruct(
            (splits, count, m, padded_n),
            out_dtype if splits == 1 else jnp.float32,
        ),
        # Tiles of the same rows of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": math.ceil(padded_n / block_n),
            "m": of_x.count(m),
        },
        scratch_types=lookup.scratch,
    )(table, codes, absmax, x, *of_x.operands, *nested)
    # The order of this sum is fixed, unlike that of atomic operations.
    return jnp.sum(parts, axis=0, dtype=parts.dtype)[..., :n].astype(out_dtype)
