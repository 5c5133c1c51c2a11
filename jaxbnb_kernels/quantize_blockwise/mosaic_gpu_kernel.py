"""Blockwise quantisation in one pass over memory: the kernels for GPUs.

A warpgroup takes a tile of blocks. Every block lies in the lanes of one warp, so its
absmax does not need other warps. Neighbouring lanes hold neighbouring elements, so
every access to memory is a whole line.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import _cells, _tiles, blockwise
from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._mosaic_gpu import double_quant, layouts, pallas, tables
from jaxbnb_kernels._mosaic_gpu.instructions import reciprocal, row_absmax
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED

# Tiles that run at a time: as many as the registers of a multiprocessor suffice for, on
# each of the 132 of an H100 or H200.
CONCURRENT_TILES = 6 * 132


def dequantize(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    *nested: Float32[Array, "*shape"],
    codebook: bytes,
    block_size: int,
    size: int,
    dtype: np.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch {size}"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        codes: see `dequantize_blockwise`.
        absmax: see `dequantize_blockwise`.
        *nested: nested absmax and offset, if any, with the batch axes of the other
            arrays. There is one offset per matrix.
        codebook: bytes of the float32 levels, hashable as static arguments must be.
        block_size: one of ``BLOCK_SIZES``.
        size: elements of the last axis.
        dtype: dtype of the result: float32, bfloat16 or float16.
        interpret: whether to interpret the kernel on the CPU.
    """
    levels = np.frombuffer(codebook, np.float32)
    per_byte = 2 if len(levels) == 16 else 1
    *batch, blocks = absmax.shape
    if codes.size == 0:
        return (jnp.zeros((*batch, size), dtype),)
    # A short last block is filled up, which costs a copy; other rows are views.
    short = blocks * block_size // per_byte - codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, short)])
    matrices = nested[1].size if nested else 1
    decoded = _decode_blocks(
        codes.reshape(matrices, -1, block_size // per_byte),
        absmax.reshape(matrices, -1),
        [x.reshape(matrices, -1) for x in nested],
        levels,
        dtype,
        interpret,
    )
    return (decoded.reshape(*batch, blocks * block_size)[..., :size],)


def _decode_blocks(
    codes: UInt8[Array, "matrices blocks stored"],
    absmax: Float32[Array, "matrices blocks"] | UInt8[Array, "matrices blocks"],
    nested: Sequence[Float32[Array, "matrices nested"]],
    levels: np.ndarray,
    dtype: np.dtype,
    interpret: bool,
) -> Float[Array, "matrices blocks size"]:
    codes = unpacked(codes, levels)
    matrices, num_blocks, block_size = codes.shape
    rows, columns = _tiles.decoded_tile(block_size, dtype)
    table = tables.shared_table(levels)
    decode_tile = tile_decoder(columns, dtype, interpret)
    missing = max(0, rows - num_blocks)
    codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)))
    absmax = jnp.pad(absmax, ((0, 0), (0, missing)))
    tiles = math.ceil((num_blocks + missing) / rows)
    # A mapped call has more than the one that was checked.
    _tiles.numbered(matrices * tiles * rows)
    level_tables = [table, DYNAMIC8_SIGNED] if nested else [table]

    def dequantize_blockwise(codes_ref, absmax_ref, levels_ref, *refs):
        *nested_refs, out_ref, table_ref = refs
        index = jax.lax.axis_index("row")
        matrix, tile = jnp.int32(0), index
        if matrices > 1:
            matrix, tile = jax.lax.div(index, tiles), jax.lax.rem(index, tiles)
        # The last tile overlaps the one before it instead of ending early. Both write
        # the same values.
        row = jnp.minimum(tile * rows, num_blocks + missing - rows)
        column = pl.ds(jax.lax.axis_index("column") * columns, columns)

        def read_absmax(layout):
            tile_absmax = pallas.load(absmax_ref.at[matrix, pl.ds(row, rows)], layout)
            if not nested:
                return tile_absmax
            nested_levels_ref, nested_ref, offset_ref = nested_refs
            offset = offset_ref[matrix, 0]
            matrix_nested_ref = nested_ref.at[matrix]
            return double_quant.decode(
                tile_absmax,
                row,
                1,
                matrix_nested_ref,
                offset,
                nested_levels_ref,
                layout,
            )

        tile = matrix, pl.ds(row, rows), column
        decode_tile(
            codes_ref.at[tile], read_absmax, levels_ref, table_ref, out_ref.at[tile]
        )

    decoded = pallas.kernel(
        dequantize_blockwise,
        out_type=jax.ShapeDtypeStruct(codes.shape, dtype),
        # The last axis is CUDA's first, and only that one may exceed 65,535.
        grid={"column": block_size // columns, "row": matrices * tiles},
        scratch_types=(plgpu.SMEM(table.shape, jnp.float32),),
        interpret=interpret,
    )(codes, absmax, *map(jnp.asarray, level_tables), *nested)
    return decoded[:, :num_blocks]


def unpacked(
    codes: UInt8[Array, "*batch stored"], levels: np.ndarray
) -> Integer[Array, "*batch size"]:
    """Views codes as elements of the array, the low half of a byte first."""
    if len(levels) == 256:
        return codes
    pairs = jax.lax.bitcast_convert_type(codes, jnp.uint4)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def tile_decoder(columns: int, dtype: np.dtype, interpret: bool) -> Callable[..., None]:
    """Returns a function that decodes a tile of blocks within a kernel.

    The function takes references to the tile's codes, to the levels in global memory,
    to their place in shared memory, and to the result. It also takes a function that
    reads the tile's absmax into registers of a given layout. The tile has ``columns``
    elements of each block.
    """
    vector_size = _tiles.WIDEST_ACCESS // dtype.itemsize
    layout = None if interpret else layouts.rows_layout(columns, vector_size)

    def decode(codes_ref, read_absmax, levels_ref, table_ref, out_ref):
        code = pallas.load(codes_ref, layout)
        tile_absmax = read_absmax(layout and layout.reduce((1,)))
        # Copied while the codes and absmax are under way.
        table_ref[...] = levels_ref[...]
        level = tables.look_up(code, table_ref, layout)
        scale = jax.lax.broadcast_in_dim(tile_absmax, level.shape, (0,))
        pallas.store(out_ref, (level * scale).astype(dtype))

    return decode


def quantize(
    x: Float[Array, "*batch n"],
    *,
    codebook: bytes,
    block_size: int,
    interpret: bool = False,
) -> tuple[UInt8[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        x: float32, bfloat16 or float16 array.
        codebook: bytes of the float32 levels, hashable as static arguments must be.
        block_size: one of ``BLOCK_SIZES``.
        interpret: whether to interpret the kernel on the CPU.
    """
    levels = np.frombuffer(codebook, np.float32)
    per_byte = 2 if len(levels) == 16 else 1
    *batch, size = x.shape
    blocks, stored = -(-size // block_size), -(-size // per_byte)
    if x.size == 0:
        return jnp.zeros((*batch, stored), jnp.uint8), jnp.zeros((*batch, blocks))
    # A short last block is filled up, which costs a copy; other rows are views.
    short = blocks * block_size - size
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, short)])
    codes, absmax = _encode_blocks(
        x.reshape(-1, block_size), codebook, 8 // per_byte, interpret
    )
    codes = codes.reshape(*batch, blocks * block_size // per_byte)
    return codes[..., :stored], absmax.reshape(*batch, blocks)


def _encode_blocks(
    x: Float[Array, "blocks size"], codebook: bytes, bits: int, interpret: bool
) -> tuple[UInt8[Array, "blocks stored"], Float32[Array, " blocks"]]:
    num_blocks, block_size = x.shape
    vector_size = _tiles.WIDEST_ACCESS // x.dtype.itemsize
    rows = rows_encoded(block_size, x.dtype)
    layout = None if interpret else layouts.rows_layout(block_size, vector_size)
    cells, table = _cells.of_codebook(codebook)
    table = tables.shared_table(table)
    missing = max(0, rows - num_blocks)
    x = jnp.pad(x, ((0, missing), (0, 0)))
    # A mapped call has more than the one that was checked.
    tiles = math.ceil(_tiles.numbered(num_blocks + missing) / rows)
    invert = functools.partial(reciprocal, layout=layout and layout.reduce((1,)))

    def quantize_blockwise(x_ref, cells_ref, codes_ref, absmax_ref, table_ref):
        table_ref[...] = cells_ref[...]

        @plgpu.nd_loop((tiles,), collective_axes="row")
        def _(loop):
            # The last tile overlaps the one before it instead of ending early. Both
            # write the same values.
            row = jnp.minimum(loop.index[0] * rows, num_blocks + missing - rows)
            tile = pl.ds(row, rows)
            values = pallas.load(x_ref.at[tile], layout).astype(jnp.float32)
            absmax = row_absmax(values)
            for factor in blockwise.factors(absmax, invert):
                values *= jax.lax.broadcast_in_dim(factor, values.shape, (0,))
            pallas.store(absmax_ref.at[tile], absmax)
            codes = tables.encode(values, table_ref, cells, bits, layout)
            pallas.store(codes_ref.at[tile], codes)

    codes, absmax = pallas.kernel(
        quantize_blockwise,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.uint4 if bits == 4 else jnp.uint8),
            jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
        ),
        # Each warpgroup reads the table, so only as many start as run at once.
        grid={"row": min(tiles, target().at_once(CONCURRENT_TILES, table.nbytes))},
        scratch_types=(plgpu.SMEM(table.shape, jnp.int32),),
        interpret=interpret,
    )(x, jnp.asarray(table))
    if bits == 4:
        pairs = codes.reshape(codes.shape[0], codes.shape[1] // 2, 2)
        codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    return codes[:num_blocks], absmax[:num_blocks]


def rows_encoded(block_size: int, dtype: np.dtype) -> int:
    """Returns how many blocks a warpgroup encodes at a time."""
    least = _tiles.tile_rows(block_size, _tiles.WIDEST_ACCESS // dtype.itemsize)
    # Memory is written 32 bytes at a time, which is eight absmax. If blocks have more
    # than 1024 elements, the registers of a warp hold only one.
    return max(8 if block_size <= 1024 else 4, least, _tiles.TILE // block_size)
