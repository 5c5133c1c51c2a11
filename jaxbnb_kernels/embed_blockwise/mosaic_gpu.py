"""Gather and decoding in one pass over the rows that are looked up, on Hopper GPUs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching
from jaxtyping import Array, Float, Float32, Int32, Integer, UInt8

from jaxbnb_kernels import _hopper
from jaxbnb_kernels.embed_blockwise import rows
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu as quantize_kernels
from jaxbnb_kernels.quantize_blockwise import xla


def embed(
    ids: Integer[Array, "*batch"],
    weight: Weight,
    dtype: np.dtype,
    *,
    required: bool = True,
) -> Float[Array, "*batch size"]:
    """See `embed_blockwise`; raises where no kernel can serve the call."""
    codebook = quantize_kernels.servable(weight.codebook, weight.block_size, dtype)
    blocks = weight.absmax.shape[-1]
    if weight.size % weight.block_size:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of whole blocks of {weight.block_size}; these "
            f"have {weight.size} elements"
        )
    least, _ = tile_of(1, weight.block_size, dtype)
    if blocks < least:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of at least {least * weight.block_size} "
            f"elements here; these have {weight.size}"
        )
    at, absmax = rows.look_up(ids, weight)
    embed_rows = _embed_rows(codebook, weight.block_size, dtype, required)
    embedded = embed_rows(at.reshape(-1), absmax.reshape(-1, blocks), weight.codes)
    return embedded.reshape(*ids.shape, weight.size)


def _embed_rows(codebook, block_size, dtype, required):
    """The operation on a list of rows; mapped, it is one on a longer list."""

    @custom_batching.custom_vmap
    def embed(at, absmax, codes):
        (embedded,) = _hopper.run(
            embed_kernel,
            _embed_portable,
            at,
            absmax,
            codes,
            required=required,
            codebook=codebook,
            block_size=block_size,
            dtype=dtype,
        )
        return embedded

    @embed.def_vmap
    def _(axis_size, is_mapped, at, absmax, codes):
        at, absmax = (
            x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, mapped in zip((at, absmax), is_mapped, strict=False)
        )
        if is_mapped[2]:
            # One matrix below the other.
            at = at + codes.shape[1] * jnp.arange(axis_size, dtype=at.dtype)[:, None]
            codes = codes.reshape(-1, codes.shape[-1])
        embedded = embed(at.reshape(-1), absmax.reshape(-1, absmax.shape[-1]), codes)
        return embedded.reshape(*at.shape, -1), True

    return embed


def _embed_portable(at, absmax, codes, *, codebook, block_size, dtype):
    levels = np.frombuffer(codebook, np.float32)
    size = absmax.shape[-1] * block_size
    return (xla.dequantize(codes[at], absmax, None, levels, block_size, size, dtype),)


def tile_of(blocks: int, block_size: int, dtype: np.dtype) -> tuple[int, int]:
    """How many of a row's blocks a warpgroup decodes, and how many elements of each."""
    from jaxbnb_kernels import _registers

    most, columns = quantize_kernels.tile_of(block_size, dtype)
    vector_size = quantize_kernels.WIDEST_ACCESS // dtype.itemsize
    least = _registers.tile_rows(columns, vector_size)
    within = 2 ** int(math.log2(blocks))
    return max(least, min(most, within)), columns


def embed_kernel(
    at: Int32[Array, " ids"],
    absmax: Float32[Array, "ids blocks"],
    codes: UInt8[Array, "rows stored"],
    *,
    codebook: bytes,
    block_size: int,
    dtype: np.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "ids size"]]:
    """The kernel itself, for who has checked that it can run.

    Args:
        at: the rows; each exists.
        absmax: of these rows, of at least a tile's blocks.
        codes: of all rows.
        codebook: the bytes of its float32 levels: hashable, as static arguments are.
        block_size: of which a row has a whole number.
        dtype: of the result: float32, bfloat16 or float16.
        interpret: run on the CPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxbnb_kernels import _pallas, _registers

    levels = np.frombuffer(codebook, np.float32)
    num_ids, blocks = absmax.shape
    if num_ids == 0:
        return (jnp.zeros((0, blocks * block_size), dtype),)
    of_blocks = codes.reshape(codes.shape[0] * blocks, -1)
    of_blocks = quantize_kernels.unpacked(of_blocks, levels)
    num_tiled, columns = tile_of(blocks, block_size, dtype)
    tiles = math.ceil(blocks / num_tiled)
    table = _registers.shared_table(levels)
    decode_tile = quantize_kernels.tile_decoder(columns, dtype, interpret)

    def embed_blockwise(at_ref, codes_ref, absmax_ref, levels_ref, out_ref, table_ref):
        index = jax.lax.axis_index("tile")
        number, tile = jax.lax.div(index, tiles), jax.lax.rem(index, tiles)
        # The last tile of a row overlaps the one before it rather than end early: both
        # write the same values.
        block = jnp.minimum(tile * num_tiled, blocks - num_tiled)
        column = pl.ds(jax.lax.axis_index("column") * columns, columns)
        source = pl.ds(at_ref[number] * blocks + block, num_tiled)
        target = pl.ds(number * blocks + block, num_tiled)
        decode_tile(
            codes_ref.at[source, column],
            functools.partial(_pallas.load, absmax_ref.at[target]),
            levels_ref,
            table_ref,
            out_ref.at[target, column],
        )

    embedded = _pallas.kernel(
        embed_blockwise,
        out_type=jax.ShapeDtypeStruct((num_ids * blocks, block_size), dtype),
        # The last axis is CUDA's first, the only one that may exceed 65,535.
        grid={"column": block_size // columns, "tile": num_ids * tiles},
        scratch_types=(plgpu.SMEM(table.shape, jnp.float32),),
        interpret=interpret,
    )(at, of_blocks, absmax.reshape(-1), jnp.asarray(table))
    return (embedded.reshape(num_ids, blocks * block_size),)
