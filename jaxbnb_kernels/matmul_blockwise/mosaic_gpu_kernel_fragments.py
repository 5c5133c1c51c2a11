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
from jaxlib.mlir.dialects import arith, llvm, memref
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from jaxbnb_kernels._mosaic_gpu import layouts
from jaxbnb_kernels._mosaic_gpu.instructions import (
    as_vector,
    elements_of,
    pick_bytes,
    words_of,
)
from jaxbnb_kernels._mosaic_gpu.layouts import LANES_OF_A_ROW
from jaxbnb_kernels._tiles import LANES, WARPS

# Orders of the low and high bytes of four levels that make two pairs. In `OF_BYTES`, a
# pair is the two codes of a byte, the first in its high half. In `OF_ROWS`, it is the
# first codes of two bytes, and then the second ones.
OF_BYTES, OF_ROWS = (0x4051, 0x6273), (0x7351, 0x6240)


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


def table(
    codebook: Float[np.ndarray, "16"], dtype: np.dtype
) -> Int32[np.ndarray, "32 8"]:
    """Returns the 16-bit levels as words, for `decode` to look them up.

    Two words hold the low bytes of codes 0 to 7, two the low bytes of codes 8 to 15,
    and four the high bytes. The words are repeated for each lane. Values that all lanes
    share would be kept in the warp's registers where registers are scarce, and every
    use would begin with a move: for 128 rows of x and nested absmax, one more
    instruction a weight.
    """
    bits = np.asarray(codebook, np.float32).astype(dtype).view(np.uint8).reshape(16, 2)
    words = np.ascontiguousarray(bits.T).reshape(-1).view(np.int32)
    return np.tile(words, (LANES, 1))


def decode_twin(
    codes: UInt8[Array, "rows half"], words: Int32[Array, "32 8"], dtype: np.dtype
) -> Float[Array, "rows group"]:
    """`decode` in jnp."""
    level_bytes = jax.lax.bitcast_convert_type(words[0], jnp.uint8).reshape(2, 16).T
    levels = jax.lax.bitcast_convert_type(level_bytes, dtype)
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    rows, half = codes.shape
    return permute(levels[pairs.reshape(rows, 2 * half)], 2 * half)


def codes_layout(group: int) -> Any:
    """Returns the layout of rows of codes, a quarter a lane, as in `Layout.WGMMA`."""
    half = group // 2
    tiles = ((64, half), (16, half), (8, half), (half // LANES_OF_A_ROW,))
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


def table_layout() -> Any:
    """Returns a layout with a row of a table in each lane, the same in every warp."""
    warps = (plgpu.Replicated(WARPS),)
    return layouts.tiled(((LANES, 8), (1, 8), (4,)), warps, (-5,))


def decode(
    codes: UInt8[Array, "rows half"],
    words: Int32[Array, "32 8"],
    dtype: np.dtype,
) -> Float[Array, "rows group"]:
    """Decodes a group of codes to `permute`d levels. `decode_twin` is the same in jnp.

    Args:
        codes: codes in registers of `codes_layout`.
        words: result of `table`, in registers of `table_layout`.
        dtype: bfloat16 or float16.

    Returns:
        Levels in registers of ``Layout.WGMMA``.
    """
    rows, half = codes.shape
    inline: Any = plgpu.inline_mgpu(
        arg_types=(codes_layout(2 * half), table_layout()),
        return_type=plgpu.ShapeDtypeStruct((rows, 2 * half), dtype, plgpu.Layout.WGMMA),
    )

    @inline
    def inlined(_, codes, words):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((rows, 2 * half)), object)
        # (rows, columns in eights, upper or lower eight rows)
        fragments = registers.reshape(rows // 64, half // 4, 2)
        lookup = [w for r in words.registers.flat for w in words_of(r)]
        for at, register in np.ndenumerate(codes.registers.reshape(rows // 64, 2)):
            pairs = [
                pair
                for word in words_of(register)
                for pair in decode_word(word, lookup)
            ]
            for column, pair in enumerate(pairs):
                fragments[at[0], column, at[1]] = as_vector(pair, dtype)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(codes, words)


def decode_word(
    word: Any, lookup: list[Any], orders: tuple[int, int] = OF_BYTES
) -> list[Any]:
    """Decodes eight codes to four pairs of levels, in one of the two orders.

    A PRMT picks four of the eight bytes in two registers, by the lower three bits of
    four nibbles. So for the low and for the high bytes of the levels, one PRMT picks
    among the first eight levels, another among the last eight, and a third picks
    between these two by the nibbles' upper bits.
    """
    i32 = ir.IntegerType.get_signless(32)

    def constant(value):
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    index = arith.andi(word, constant(0x77777777))
    # 0 to 3 select bytes of the first operand, 4 to 7 of the second. This is one
    # instruction for (word >> 1 & 0x44444444) | 0x32103210; the compiler would use two.
    bits = constant(0x44444444), constant(0x32103210)
    which: Any = llvm.inline_asm(
        i32,
        [arith.shrui(word, constant(1)), *bits],
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "=r,r,r,r",
    )
    pairs = []
    for shift in (0, 16):
        if shift:
            index = arith.shrui(index, constant(shift))
            which = arith.shrui(which, constant(shift))
        low, high = (
            pick_bytes(
                pick_bytes(lookup[i], lookup[i + 1], index),
                pick_bytes(lookup[i + 2], lookup[i + 3], index),
                which,
            )
            for i in (0, 4)
        )
        pairs += [pick_bytes(low, high, constant(order)) for order in orders]
    return pairs
