"""How the 4-bit product holds its operands: codes as the tensor cores take weights.

A warpgroup's product takes 16 columns of its left operand at a time. Each of the four
lanes that share a row holds two neighbours in either half:

    lane     0 0 1 1 2 2 3 3 0 0 1 1 2 2 3 3

A lane that reads neighbouring codes holds other columns. But a sum may be taken in any
order. So the columns of both operands are permuted within groups, to the order in which
the lanes hold them, and lanes do not exchange anything. For the codes this costs
nothing. `permute` permutes the other operand beforehand.
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

# The order in which the low and high bytes of four levels make two pairs. A pair is
# either a byte's two codes, the first in its high half, or the first codes of two bytes
# and then the second ones.
OF_BYTES, OF_ROWS = (0x4051, 0x6273), (0x7351, 0x6240)


def permute(x: Shaped[Array, "*batch k"], group: int) -> Shaped[Array, "*batch k"]:
    """The columns of each group in the order in which lanes hold them.

    Lane c of a row reads the c-th quarter of the group, as pairs; the product takes
    the first pair of each lane, then the second one of each.
    """
    pairs = x.reshape(*x.shape[:-1], -1, LANES_OF_A_ROW, group // 8, 2)
    return jnp.swapaxes(pairs, -3, -2).reshape(x.shape)


def table(
    codebook: Float[np.ndarray, "16"], dtype: np.dtype
) -> Int32[np.ndarray, "32 8"]:
    """The levels in 16 bits: two words of low bytes, codes 0 to 7, and so for 8 to 15.

    Then as many words of high bytes; and all of that once for each lane. Where
    registers are few, the compiler keeps what is the same in all lanes in those of the
    warp, from where each use begins with a move: for 128 rows of x and nested absmax,
    one more instruction a weight.
    """
    bits = np.asarray(codebook, np.float32).astype(dtype).view(np.uint8).reshape(16, 2)
    words = np.ascontiguousarray(bits.T).reshape(-1).view(np.int32)
    return np.tile(words, (LANES, 1))


def decode_twin(
    codes: UInt8[Array, "rows half"], words: Int32[Array, "32 8"], dtype: np.dtype
) -> Float[Array, "rows group"]:
    """`decode` in jnp."""
    of_level = jax.lax.bitcast_convert_type(words[0], jnp.uint8).reshape(2, 16).T
    levels = jax.lax.bitcast_convert_type(of_level, dtype)
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    rows, half = codes.shape
    return permute(levels[pairs.reshape(rows, 2 * half)], 2 * half)


def codes_layout(group: int) -> Any:
    """Rows of ``group`` codes, a quarter of them a lane; rows as `Layout.WGMMA`."""
    half = group // 2
    tiles = ((64, half), (16, half), (8, half), (half // LANES_OF_A_ROW,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-7,), (-3, -2), -1)


def absmax_layout(rows: int, columns: int) -> Any:
    """Absmax of 128 rows, a row a thread; or of 64, where two threads have the same."""
    of_warp = rows // WARPS
    tiles = (rows, columns), (of_warp, columns), (1, columns)
    copies = plgpu.Replicated(LANES // of_warp)
    return layouts.tiled(tiles, (-6,), (-4, copies) if of_warp < 32 else (-4,))


def share_absmax(
    ref: Any, absmax: Float[Array, "rows columns"], group: int | None = None
) -> None:
    """Writes them to shared memory, ``(columns, rows)``, to be read when all have met.

    Pallas itself would have all meet before and afterwards.

    Args:
        ref: destination.
        absmax: absmax in registers of `absmax_layout`.
        group: number of rows that are written in the order that `permute` takes, with
            those of a lane next to each other; None for the order of rows.
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
    """Where `permute` finds what it brings to an index."""
    of_lane = group // LANES_OF_A_ROW
    # (from, how many, to), of the pair's element, the lane, and the lane's pair.
    fields = (
        (1, 2, 1),
        (2, LANES_OF_A_ROW, of_lane),
        (2 * LANES_OF_A_ROW, of_lane // 2, 2),
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
    """A row of a table in each lane, the same ones in each warp."""
    warps = (plgpu.Replicated(WARPS),)
    return layouts.tiled(((LANES, 8), (1, 8), (4,)), warps, (-5,))


def decode(
    codes: UInt8[Array, "rows half"],
    words: Int32[Array, "32 8"],
    dtype: np.dtype,
) -> Float[Array, "rows group"]:
    """The levels of a group of codes, `permute`d: `decode_twin` of them.

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
    """Eight codes to four pairs of levels, in that order.

    A PRMT picks four of the eight bytes in two registers, by the lower three bits of
    as many nibbles. So for the lower and the higher bytes of the levels, one picks
    among the first eight levels, one among the last, and one, by the nibble's own
    upper bit, between these two.
    """
    i32 = ir.IntegerType.get_signless(32)

    def constant(value):
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    index = arith.andi(word, constant(0x77777777))
    # 0 to 3 select bytes of the first operand, 4 to 7 of the second. The compiler would
    # make two instructions of (word >> 1 & 0x44444444) | 0x32103210; this is one.
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
