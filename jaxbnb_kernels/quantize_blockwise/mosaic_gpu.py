"""Blockwise quantisation in one pass over memory, for Hopper GPUs."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import _blocks, _cells, _hopper, _partition
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.quantize_blockwise import reference, xla

BLOCK_SIZES = tuple(2**i for i in range(5, 13))
# What a warpgroup decodes or encodes at a time: 32 elements a thread.
TILE = 4096
# Bytes that a thread reads or writes at once.
WIDEST_ACCESS = 16
# On each multiprocessor of an H100 or H200 as many as its registers suffice for.
CONCURRENT_TILES = 6 * 132


def quantize(
    x: Float[Array, "*batch n"],
    codebook: np.ndarray | None,
    block_size: int,
    *,
    required: bool = True,
) -> tuple[UInt8[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """See `quantize_blockwise`; raises where no kernel can serve the call."""
    levels = servable(codebook, block_size, x.dtype)
    # Whether it can be encoded shows here, not when it is lowered.
    _cells.of_codebook(levels)
    return _quantize(x, levels, block_size, required)


def dequantize(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    nested: tuple[Array, Array] | None,
    codebook: np.ndarray | None,
    block_size: int,
    size: int,
    dtype: np.dtype,
    *,
    required: bool = True,
) -> Float[Array, "*batch {size}"]:
    """See `dequantize_blockwise`; raises where no kernel can serve it."""
    levels = servable(codebook, block_size, dtype)
    return _dequantize(
        codes, absmax, nested or (), levels, block_size, size, dtype, required
    )


def servable(codebook: np.ndarray | None, block_size: int, dtype: np.dtype) -> bytes:
    """The codebook as a kernel takes it, of a call that a kernel can serve."""
    if codebook is None:
        raise NotImplementedError("mosaic_gpu has no linear int8, only codebooks")
    if block_size not in BLOCK_SIZES:
        raise NotImplementedError(
            f"mosaic_gpu has blocks of {BLOCK_SIZES} elements here; got {block_size}"
        )
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"mosaic_gpu has no {jnp.dtype(dtype)}")
    return np.asarray(codebook, np.float32).tobytes()


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _quantize(x, codebook, block_size, required):
    codes, absmax = _hopper.run(
        quantize_kernel,
        _quantize_portable,
        x,
        required=required,
        divided=_quantize_divided,
        codebook=codebook,
        block_size=block_size,
    )
    return codes, absmax


@_quantize.defjvp
def _quantize_jvp(codebook, block_size, required, primals, tangents):
    def portable(x):
        return _quantize_portable(x, codebook=codebook, block_size=block_size)

    # By xla, whose operations jax can transpose; what it encodes is dropped.
    _, change = jax.jvp(portable, primals, tangents)
    return _quantize(*primals, codebook, block_size, required), change


def _quantize_portable(x, *, codebook, block_size):
    return xla.quantize(x, np.frombuffer(codebook, np.float32), block_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6, 7))
def _dequantize(codes, absmax, nested, codebook, block_size, size, dtype, required):
    (decoded,) = _hopper.run(
        dequantize_kernel,
        _dequantize_portable,
        codes,
        absmax,
        *nested,
        required=required,
        divided=_dequantize_divided,
        codebook=codebook,
        block_size=block_size,
        size=size,
        dtype=dtype,
    )
    return decoded


@_dequantize.defjvp
def _dequantize_jvp(codebook, block_size, size, dtype, required, primals, tangents):
    codes, absmax, nested = primals

    def portable(floats):
        (decoded,) = _dequantize_portable(
            codes,
            *((absmax, *floats) if nested else floats),
            codebook=codebook,
            block_size=block_size,
            size=size,
            dtype=dtype,
        )
        return decoded

    # By xla, whose operations jax can transpose; what it decodes is dropped.
    floats, changes = (nested, tangents[2]) if nested else ((absmax,), tangents[1:2])
    _, change = jax.jvp(portable, (floats,), (changes,))
    return _dequantize(*primals, codebook, block_size, size, dtype, required), change


def _quantize_divided(x, *, codebook, block_size):
    names = *_partition.leading(x.ndim - 1), of_blocks(x.shape[-1], block_size)
    kernel = functools.partial(
        quantize_kernel, codebook=codebook, block_size=block_size
    )
    return _partition.divide(kernel, _partition.Axes((names,), (names, names)), x)


def of_blocks(size: int, block_size: int) -> str | None:
    """The name of an axis that may be divided between whole blocks."""
    return None if size % block_size else "blocks"


def _dequantize_divided(codes, absmax, *nested, codebook, block_size, size, dtype):
    absmax = reference.float_absmax(absmax, nested or None)
    names = *_partition.leading(codes.ndim - 1), of_blocks(size, block_size)
    stored = codes.shape[-1]

    def kernel(codes, absmax):
        return dequantize_kernel(
            codes,
            absmax,
            codebook=codebook,
            block_size=block_size,
            size=size * codes.shape[-1] // max(stored, 1),
            dtype=dtype,
        )

    return _partition.divide(
        kernel, _partition.Axes((names, names), (names,)), codes, absmax
    )


def _dequantize_portable(codes, absmax, *nested, codebook, block_size, size, dtype):
    levels = np.frombuffer(codebook, np.float32)
    decode = functools.partial(xla.dequantize, codes, absmax, nested or None)
    return (decode(levels, block_size, size, dtype),)


def dequantize_kernel(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    *nested: Float32[Array, "*shape"],
    codebook: bytes,
    block_size: int,
    size: int,
    dtype: np.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch {size}"]]:
    """The kernel itself, for who has checked that it can run.

    Args:
        codes: as of `dequantize_blockwise`.
        absmax: as of `dequantize_blockwise`.
        *nested: if it is, the nested absmax and the offset. Arrays of the same batch
            axes as the others; there are as many matrices as offsets.
        codebook: the bytes of its float32 levels: hashable, as static arguments are.
        block_size: one of ``BLOCK_SIZES``.
        size: elements of the last axis.
        dtype: of the result: float32, bfloat16 or float16.
        interpret: run on the CPU.
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


def tile_of(block_size: int, dtype: np.dtype) -> tuple[int, int]:
    """How many blocks a warpgroup decodes, and how many elements of each."""
    from jaxbnb_kernels import _registers

    least = _registers.tile_rows(block_size, WIDEST_ACCESS // dtype.itemsize)
    rows = max(least, TILE // block_size)
    return rows, min(block_size, TILE // rows)


def _decode_blocks(
    codes: UInt8[Array, "matrices blocks stored"],
    absmax: Float32[Array, "matrices blocks"] | UInt8[Array, "matrices blocks"],
    nested: Sequence[Float32[Array, "matrices nested"]],
    levels: np.ndarray,
    dtype: np.dtype,
    interpret: bool,
) -> Float[Array, "matrices blocks size"]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxbnb_kernels import _nested, _pallas, _registers

    codes = unpacked(codes, levels)
    matrices, num_blocks, block_size = codes.shape
    rows, columns = tile_of(block_size, dtype)
    table = _registers.shared_table(levels)
    decode_tile = tile_decoder(columns, dtype, interpret)
    missing = max(0, rows - num_blocks)
    codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)))
    absmax = jnp.pad(absmax, ((0, 0), (0, missing)))
    tiles = math.ceil((num_blocks + missing) / rows)
    tables = [table, DYNAMIC8_SIGNED] if nested else [table]

    def dequantize_blockwise(codes_ref, absmax_ref, levels_ref, *refs):
        *nested_refs, out_ref, table_ref = refs
        index = jax.lax.axis_index("row")
        matrix, tile = jnp.int32(0), index
        if matrices > 1:
            matrix, tile = jax.lax.div(index, tiles), jax.lax.rem(index, tiles)
        # The last tile overlaps the one before it rather than end early: both write
        # the same values.
        row = jnp.minimum(tile * rows, num_blocks + missing - rows)
        column = pl.ds(jax.lax.axis_index("column") * columns, columns)

        def read_absmax(layout):
            of_block = _pallas.load(absmax_ref.at[matrix, pl.ds(row, rows)], layout)
            if not nested:
                return of_block
            nested_levels_ref, nested_ref, offset_ref = nested_refs
            offset = offset_ref[matrix, 0]
            of_matrix = nested_ref.at[matrix]
            return _nested.decode(
                of_block, row, 1, of_matrix, offset, nested_levels_ref, layout
            )

        tile = matrix, pl.ds(row, rows), column
        decode_tile(
            codes_ref.at[tile], read_absmax, levels_ref, table_ref, out_ref.at[tile]
        )

    decoded = _pallas.kernel(
        dequantize_blockwise,
        out_type=jax.ShapeDtypeStruct(codes.shape, dtype),
        # The last axis is CUDA's first, the only one that may exceed 65,535.
        grid={"column": block_size // columns, "row": matrices * tiles},
        scratch_types=(plgpu.SMEM(table.shape, jnp.float32),),
        interpret=interpret,
    )(codes, absmax, *map(jnp.asarray, tables), *nested)
    return decoded[:, :num_blocks]


def unpacked(
    codes: UInt8[Array, "*batch stored"], levels: np.ndarray
) -> Integer[Array, "*batch size"]:
    """Codes as elements of the array: a view. Of two in a byte, the low half first."""
    if len(levels) == 256:
        return codes
    pairs = jax.lax.bitcast_convert_type(codes, jnp.uint4)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def tile_decoder(columns: int, dtype: np.dtype, interpret: bool) -> Callable[..., None]:
    """What decodes a tile of blocks, ``columns`` elements of each, within a kernel.

    It takes references: to the codes of the tile, to the levels in global memory, to
    where they go in shared memory, and to the result. And a function that reads the
    tile's absmax to registers of a layout.
    """
    from jaxbnb_kernels import _pallas, _registers

    vector_size = WIDEST_ACCESS // dtype.itemsize
    layout = None if interpret else _registers.rows_layout(columns, vector_size)

    def decode(codes_ref, read_absmax, levels_ref, table_ref, out_ref):
        code = _pallas.load(codes_ref, layout)
        of_block = read_absmax(layout and layout.reduce((1,)))
        # While these are under way.
        table_ref[...] = levels_ref[...]
        level = _registers.look_up(code, table_ref, layout)
        scale = jax.lax.broadcast_in_dim(of_block, level.shape, (0,))
        _pallas.store(out_ref, (level * scale).astype(dtype))

    return decode


def quantize_kernel(
    x: Float[Array, "*batch n"],
    *,
    codebook: bytes,
    block_size: int,
    interpret: bool = False,
) -> tuple[UInt8[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """The kernel itself, for who has checked that it can run.

    Args:
        x: float32, bfloat16 or float16.
        codebook: the bytes of its float32 levels: hashable, as static arguments are.
        block_size: one of ``BLOCK_SIZES``.
        interpret: run on the CPU.
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
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxbnb_kernels import _pallas, _registers

    num_blocks, block_size = x.shape
    vector_size = WIDEST_ACCESS // x.dtype.itemsize
    rows = rows_encoded(block_size, x.dtype)
    layout = None if interpret else _registers.rows_layout(block_size, vector_size)
    cells, table = _cells.of_codebook(codebook)
    table = _registers.shared_table(table)
    missing = max(0, rows - num_blocks)
    x = jnp.pad(x, ((0, missing), (0, 0)))
    tiles = math.ceil((num_blocks + missing) / rows)
    reciprocal = functools.partial(
        _registers.reciprocal, layout=layout and layout.reduce((1,))
    )

    def quantize_blockwise(x_ref, cells_ref, codes_ref, absmax_ref, table_ref):
        table_ref[...] = cells_ref[...]

        @plgpu.nd_loop((tiles,), collective_axes="row")
        def _(loop):
            # The last tile overlaps the one before it rather than end early: both
            # write the same values.
            row = jnp.minimum(loop.index[0] * rows, num_blocks + missing - rows)
            tile = pl.ds(row, rows)
            values = _pallas.load(x_ref.at[tile], layout).astype(jnp.float32)
            absmax = jnp.max(jnp.abs(values), axis=1)
            for factor in _blocks.factors(absmax, reciprocal):
                values *= jax.lax.broadcast_in_dim(factor, values.shape, (0,))
            _pallas.store(absmax_ref.at[tile], absmax)
            codes = _registers.encode(values, table_ref, cells, bits, layout)
            _pallas.store(codes_ref.at[tile], codes)

    codes, absmax = _pallas.kernel(
        quantize_blockwise,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.uint4 if bits == 4 else jnp.uint8),
            jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
        ),
        # Each reads the table, so there are no more than run at once.
        grid={"row": min(tiles, CONCURRENT_TILES)},
        scratch_types=(plgpu.SMEM(table.shape, jnp.int32),),
        interpret=interpret,
    )(x, jnp.asarray(table))
    if bits == 4:
        pairs = codes.reshape(codes.shape[0], codes.shape[1] // 2, 2)
        codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    return codes[:num_blocks], absmax[:num_blocks]


def rows_encoded(block_size: int, dtype: np.dtype) -> int:
    """How many blocks a warpgroup encodes at a time."""
    from jaxbnb_kernels import _registers

    least = _registers.tile_rows(block_size, WIDEST_ACCESS // dtype.itemsize)
    # Eight absmax are the 32 bytes that memory is written in. Of longer blocks, the
    # registers of a warp hold one.
    return max(8 if block_size <= 1024 else 4, least, TILE // block_size)
