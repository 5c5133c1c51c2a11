"""How the 4-bit product holds its operands: codes in the order of the tensor cores.

A warpgroup's product takes 16 columns of its left operand at a time. Each of the four
lanes that share a row holds two neighbours in either half:

    lane     0 0 1 1 2 2 3 3 0 0 1 1 2 2 3 3

A lane that reads neighbouring codes holds other columns. But a sum may be taken in any
order. So the columns of both operands are permuted within groups, to the order in which
the lanes hold them, and lanes do not exchange anything. For codes this costs nothing.
`permute` permutes the other operand beforehand.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from jaxbnb_kernels._mosaic_gpu import layouts
from jaxbnb_kernels._mosaic_gpu.instructions import as_vector, elements_of
from jaxbnb_kernels._mosaic_gpu.layouts import LANES_OF_A_ROW
from jaxbnb_kernels._tiles import LANES, WARPS
from jaxbnb_kernels.matmul_blockwise.mosaic_gpu_kernel_lookup import NIBBLES, Lookup


def with_rows(
    least: int, codes: UInt8[Array, "count rows half"], absmax: Array
) -> tuple[UInt8[Array, "count padded_rows half"], Array]:
    """Appends rows of zeros until a matrix has ``least``: a tile must fit into it.

    Copies only small arrays, or nothing.
    """
    missing = max(0, least - codes.shape[1])
    pad = (0, 0), (0, missing), (0, 0)
    return jnp.pad(codes, pad), jnp.pad(absmax, pad)


def permute(x: Shaped[Array, "*batch k"], group: int) -> Shaped[Array, "*batch k"]:
    """Puts the columns of each group in the order in which lanes hold them.

    Lane c of a row reads the c-th quarter of the group, as pairs. The product takes the
    first pair of each lane, then the second pair of each.
    """
    pairs = x.reshape(*x.shape[:-1], -1, LANES_OF_A_ROW, group // 8, 2)
    return jnp.swapaxes(pairs, -3, -2).reshape(x.shape)


def decode_twin(
    codes: UInt8[Array, "rows half"], words: Int32[Array, "32 8"], dtype: np.dtype
) -> Float[Array, "rows group"]:
    """`decode` in jnp."""
    level_bytes = jax.lax.bitcast_convert_type(words[0], jnp.uint8).reshape(2, 16).T
    levels = jax.lax.bitcast_convert_type(level_bytes, dtype)
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    rows, half = codes.shape
    return permute(levels[pairs.reshape(rows, 2 * half)], 2 * half)


def codes_layout(stored: int) -> Any:
    """Returns the layout of rows of codes, a quarter a lane, as in `Layout.WGMMA`."""
    tiles = (64, stored), (16, stored), (8, stored), (stored // LANES_OF_A_ROW,)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-7,), (-3, -2), -1)


def absmax_layout(rows: int, columns: int) -> Any:
    """Returns the layout of absmax: of 128 rows, one a thread; of 64, one in two."""
    warp_rows = rows // WARPS
    tiles = (rows, columns), (warp_rows, columns), (1, columns)
    copies = plgpu.Replicated(LANES // warp_rows)
    return layouts.tiled(tiles, (-6,), (-4, copies) if warp_rows < 32 else (-4,))


def share_absmax(
    ref: Any, absmax: Float[Array, "rows columns"], group: int | None = None
) -> None:
    """Writes absmax to shared memory, as ``(columns, rows)``, without a barrier.

    Pallas itself would place a barrier before and after. The caller places one before
    threads read the absmax.

    Args:
        ref: destination.
        absmax: absmax in registers of `absmax_layout`.
        group: number of rows that are written in the order that `permute` expects,
            with the rows of a lane next to each other; None to keep the order of rows.
    """
    layout = absmax_layout(*absmax.shape)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))

    @inline
    def inlined(_, ref, absmax):
        places = absmax.layout.thread_idxs(absmax.shape)
        for register, (row, _) in zip(absmax.registers.flat, places, strict=True):
            if group:
                row = _before_permute(row, group)
            for column, element in enumerate(elements_of(register)):
                at = arith.constant(ir.IndexType.get(), column)
                memref.store(element, ref, [at, row])

    inlined(ref, absmax)


def _before_permute(index: Any, group: int) -> Any:
    """Returns the index from which `permute` takes the element for this index."""
    lane_columns = group // LANES_OF_A_ROW
    # (old stride, count, new stride) of a pair's element, the lane, a lane's pair, and
    # the group.
    fields = (
        (1, 2, 1),
        (2, LANES_OF_A_ROW, lane_columns),
        (2 * LANES_OF_A_ROW, lane_columns // 2, 2),
        (group, None, group),
    )

    def constant(value):
        return arith.constant(ir.IndexType.get(), value)

    place = constant(0)
    for start, count, to in fields:
        field = arith.divui(index, constant(start))
        if count is not None:
            field = arith.remui(field, constant(count))
        place = arith.addi(place, arith.muli(field, constant(to)))
    return place


def decode(
    codes: UInt8[Array, "rows stored"],
    table: Any,
    dtype: np.dtype,
    lookup: Lookup = NIBBLES,
) -> Float[Array, "rows group"]:
    """Decodes a group of codes to `permute`d levels. `decode_twin` is the same in jnp.

    Args:
        codes: codes in registers of `codes_layout`.
        table: levels as ``lookup`` holds them.
        dtype: bfloat16 or float16.
        lookup: how levels are looked up.

    Returns:
        Levels in registers of ``Layout.WGMMA``.
    """
    rows, stored = codes.shape
    shape = rows, stored * lookup.per_byte
    inline: Any = plgpu.inline_mgpu(
        arg_types=(codes_layout(stored), lookup.argument),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )

    @inline
    def inlined(_, codes, table):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), object)
        # (rows, columns in eights, upper or lower eight rows)
        fragments = registers.reshape(rows // 64, shape[1] // 8, 2)
        for at, register in np.ndenumerate(codes.registers.reshape(rows // 64, 2)):
            for column, pair in enumerate(lookup.pairs(register, table)):
                fragments[at[0], column, at[1]] = as_vector(pair, dtype)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(codes, table)
