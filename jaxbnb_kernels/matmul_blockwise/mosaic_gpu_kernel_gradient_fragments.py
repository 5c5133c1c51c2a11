"""How the gradient's kernel holds its operands: two rows of codes, interleaved.

A lane holds the same bytes of two rows of W, which are neighbours along the sum. With
these interleaved, `mosaic_gpu_kernel_lookup.decode_word` makes pairs of levels along
the sum, as the tensor cores take them.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels._mosaic_gpu import layouts
from jaxbnb_kernels._mosaic_gpu.instructions import (
    as_vector,
    elements_of,
    words_of,
)
from jaxbnb_kernels._mosaic_gpu.layouts import LANES_OF_A_ROW, ROWS_OF_A_WARP
from jaxbnb_kernels._tiles import WARPS
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES, Lookup


def across_layout(columns: int) -> Any:
    """Returns the layout of codes where a lane holds ``columns / 64`` bytes of a row.

    A product takes 16 rows at a time. They lie where `Layout.WGMMA` has the columns of
    a left operand, so lanes do not need each other's codes.
    """
    stored = columns // 2
    lane_bytes = stored // (WARPS * ROWS_OF_A_WARP)
    # (..., warp, lane of the rows' pairs, lane of the columns, row of the pair, byte)
    tiles = (8, stored), (8, stored // WARPS), (2, lane_bytes), (1, lane_bytes)
    return layouts.tiled(tiles, (-7,), (-5, -6))


def scale_layout(entries: int, group: int) -> Any:
    """Returns the layout of scales ``(entries, rows)`` for codes in `across_layout`.

    Args:
        entries: blocks side by side in a tile: 1, 2, 4 or 8. A warp has the codes of
            one or two of them.
        group: number of rows, see `share_absmax`. A lane's rows are next to each other.
    """
    warp_entries = max(1, entries // WARPS)
    tiles = (entries, group), (warp_entries, group), (1, group // LANES_OF_A_ROW)
    warps, lanes = entries // warp_entries, ROWS_OF_A_WARP // warp_entries
    warp_dims = () if warps == 1 else (-6,)
    if warps < WARPS:
        warp_dims += (plgpu.Replicated(WARPS // warps),)
    block_dims = () if warp_entries == 1 else (-4,)
    return layouts.tiled(tiles, warp_dims, (*block_dims, plgpu.Replicated(lanes), -3))


def decode_across(
    codes: UInt8[Array, "rows stored"],
    scale: Float[Array, "entries tile_rows"],
    step: int,
    table: Any,
    layout: Any,
    lookup: Lookup = NIBBLES,
) -> Float[Array, "columns rows"]:
    """Decodes rows and transposes them, into rows that `in_order` puts in order.

    A lane holds the same bytes of two rows that a product takes as a pair. Its levels
    are pairs of codes from the two rows.

    Args:
        codes: codes in registers of ``layout``.
        scale: scales of the blocks of a tile, in registers of `scale_layout`, in groups
            of as many rows; bfloat16 or float16, like the result.
        step: number of the group.
        table: levels as ``lookup`` holds them.
        layout: `across_layout`, or another one of as many rows and bytes a lane.
        lookup: how levels are looked up.

    Returns:
        Levels in registers of ``Layout.WGMMA``.
    """
    (rows, stored), dtype = codes.shape, scale.dtype
    shape = stored * lookup.per_byte, rows
    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            layout,
            scale_layout(scale.shape[0], rows),
            lookup.argument,
        ),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )

    @inline
    def inlined(_, codes, scale, table):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), object)
        # (rows, columns in eights, upper or lower eight rows)
        fragments = registers.reshape(shape[0] // 64, rows // 8, 2)
        pairs_of_rows = codes.registers.reshape(rows // 8, 2)
        scales = words_of(scale.registers.flat[step])
        for at, (first, second) in enumerate(pairs_of_rows):
            pairs = lookup.pairs_of_rows(first, second, table)
            for column, pair in enumerate(pairs):
                levels = _product(pair, scales[at], dtype)
                fragments[column // 2, at, column % 2] = as_vector(levels, dtype)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(codes, scale, table)


def out_layout(columns: int, dtype: np.dtype) -> Any:
    """Returns the layout of the rows that `in_order` makes, of up to 16 bytes."""
    lane_columns = columns // (WARPS * ROWS_OF_A_WARP)
    vector_size = min(lane_columns, 16 // np.dtype(dtype).itemsize)
    # (..., warp, lane of the tokens' pairs, lane of the columns, token, register, 1)
    tiles = (
        (8, columns),
        (8, columns // WARPS),
        (2, lane_columns),
        (1, vector_size),
    )
    return layouts.tiled(tiles, (-7,), (-5, -6))


def in_order(
    sums: Float32[Array, "columns tokens"], dtype: np.dtype
) -> Float[Array, "tokens columns"]:
    """Transposes sums that have the rows of `decode_across`; a lane gets neighbours.

    Returns:
        Sums in that dtype, in registers of `out_layout`.
    """
    columns, tokens = sums.shape
    lane_columns = columns // (WARPS * ROWS_OF_A_WARP)
    vector_size = min(lane_columns, 16 // np.dtype(dtype).itemsize)
    out = out_layout(columns, dtype)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((tokens, columns), sums.dtype, out),
    )

    @inline
    def inlined(_, sums):
        layout = out.to_mgpu()
        # (rows, columns in eights, upper or lower eight rows)
        pairs = sums.registers.reshape(columns // 64, tokens // 8, 2)
        registers = np.empty(layout.registers_shape((tokens, columns)), object)
        token_registers = registers.reshape(tokens // 8, 2, lane_columns // vector_size)
        vector_type = ir.VectorType.get((vector_size,), ir.F32Type.get())
        for eight in range(tokens // 8):
            held = [elements_of(r) for r in pairs[:, eight].flat]
            for token, numbers in enumerate(zip(*held, strict=True)):
                for i in range(lane_columns // vector_size):
                    neighbours = numbers[i * vector_size :][:vector_size]
                    token_registers[eight, token, i] = vector.from_elements(
                        vector_type, neighbours
                    )
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(sums).astype(dtype)


def _product(pair: Any, scales: Any, dtype: np.dtype) -> Any:
    """Multiplies two numbers of 16 bits by two others."""
    operands, instruction = [pair, scales], "mul.rn.f16x2 $0, $1, $2;"
    if dtype == jnp.bfloat16:
        # GPUs older than Hopper only multiply these if they add as well: minus zero.
        i32 = ir.IntegerType.get_signless(32)
        zeros = ir.IntegerAttr.get(i32, -0x7FFF8000)
        operands.append(arith.constant(i32, zeros))
        instruction = "fma.rn.bf16x2 $0, $1, $2, $3;"
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(pair.type, operands, instruction, constraints)
