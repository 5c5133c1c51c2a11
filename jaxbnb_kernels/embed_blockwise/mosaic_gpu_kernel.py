"""The kernel that gathers and decodes rows in one pass over them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jaxbnb_kernels import _tiles
from jaxbnb_kernels._mosaic_gpu import pallas, tables
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu_kernel as quantize_kernels


def embed(
    at: Int32[Array, " ids"],
    absmax: Float32[Array, "ids blocks"],
    codes: UInt8[Array, "rows stored"],
    *,
    codebook: bytes,
    block_size: int,
    dtype: np.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "ids size"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        at: numbers of existing rows.
        absmax: absmax of these rows; a row has at least as many blocks as a tile.
        codes: codes of all rows.
        codebook: bytes of the float32 levels, hashable as static arguments must be.
        block_size: elements of a block; a row consists of whole blocks.
        dtype: dtype of the result: float32, bfloat16 or float16.
        interpret: whether to interpret the kernel on the CPU.
    """
    levels = np.frombuffer(codebook, np.float32)
    num_ids, blocks = absmax.shape
    if num_ids == 0:
        return (jnp.zeros((0, blocks * block_size), dtype),)
    block_codes = codes.reshape(codes.shape[0] * blocks, -1)
    block_codes = quantize_kernels.unpacked(block_codes, levels)
    num_tiled, columns = tile_of(blocks, block_size, dtype)
    tiles = math.ceil(blocks / num_tiled)
    table = tables.shared_table(levels)
    decode_tile = quantize_kernels.tile_decoder(columns, dtype, interpret)

    def embed_blockwise(at_ref, codes_ref, absmax_ref, levels_ref, out_ref, table_ref):
        index = jax.lax.axis_index("tile")
        number, tile = jax.lax.div(index, tiles), jax.lax.rem(index, tiles)
        # A row's last tile overlaps the one before it instead of ending early. Both
        # write the same values.
        block = jnp.minimum(tile * num_tiled, blocks - num_tiled)
        column = pl.ds(jax.lax.axis_index("column") * columns, columns)
        source = pl.ds(at_ref[number] * blocks + block, num_tiled)
        target = pl.ds(number * blocks + block, num_tiled)
        decode_tile(
            codes_ref.at[source, column],
            functools.partial(pallas.load, absmax_ref.at[target]),
            levels_ref,
            table_ref,
            out_ref.at[target, column],
        )

    embedded = pallas.kernel(
        embed_blockwise,
        out_type=jax.ShapeDtypeStruct((num_ids * blocks, block_size), dtype),
        # The last axis is CUDA's first, and only that one may exceed 65,535.
        grid={"column": block_size // columns, "tile": num_ids * tiles},
        scratch_types=(plgpu.SMEM(table.shape, jnp.float32),),
        interpret=interpret,
    )(at, block_codes, absmax.reshape(-1), jnp.asarray(table))
    return (embedded.reshape(num_ids, blocks * block_size),)


def tile_of(blocks: int, block_size: int, dtype: np.dtype) -> tuple[int, int]:
    """Returns how many blocks of a row a tile has, and how many elements of each."""
    most, columns = _tiles.decoded_tile(block_size, dtype)
    least = _tiles.least_rows(block_size, dtype)
    within = 2 ** int(math.log2(blocks))
    return max(least, min(most, within)), columns
