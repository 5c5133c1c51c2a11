"""How the 4-bit product holds its operands: codes as the tensor cores take weights.

A warpgroup's product takes 16 columns of its left operand at a time, of which each of
the four lanes that share a row holds two neighbours in either half:

    lane     0 0 1 1 2 2 3 3 0 0 1 1 2 2 3 3

A lane that reads neighbouring codes holds others. But a sum may be taken in any order:
so the columns of both operands are permuted within groups, to the order in which the
lanes hold them, and no lane passes anything to another. Of the codes that costs
nothing; the other operand is permuted beforehand, by `permute`.

It imports Pallas, so that it is imported where a kernel is lowered.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from jaxbnb_kernels import _registers

LANES_OF_A_ROW = 4
ROWS_OF_A_WARP = 8
# In which order the bytes of four levels, low and high, make two pairs of them: each
# byte's two codes, of which the first is in its high half; or the first codes of two
# bytes, and the second ones.
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
    return np.tile(words, (_registers.LANES, 1))


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


def x_layout(columns: int, width: int) -> Any:
    """Rows of ``columns`` numbers of 16 bits, in 16 bytes a lane.

    A warp has whole rows of tiles of 8 rows and ``width`` columns, so that it writes
    those to shared memory, where they are contiguous, without bank conflicts.
    """
    vector = 8
    at_once = _registers.WARPS * _registers.LANES * vector
    tiles = (
        (at_once // columns, columns),
        (_registers.LANES * vector // width, width),
        (vector,),
    )
    return _registers.tiled(tiles, (-5, -4), (-3, -2))


def across_layout(columns: int) -> Any:
    """Codes of rows, of which each lane holds ``columns / 64`` bytes of its own.

    Rows are what a product takes 16 of at a time, and lie where `Layout.WGMMA` has the
    columns of a left operand: no lane holds what another one needs.
    """
    stored = columns // 2
    of_lane = stored // (_registers.WARPS * ROWS_OF_A_WARP)
    # (..., warp, lane of the rows' pairs, lane of the columns, row of the pair, byte)
    tiles = (8, stored), (8, stored // _registers.WARPS), (2, of_lane), (1, of_lane)
    return _registers.tiled(tiles, (-7,), (-5, -6))


def scale_layout(entries: int, group: int) -> Any:
    """The scales, ``(entries, rows)``, of codes in `across_layout`: a lane's together.

    Args:
        entries: blocks side by side in a tile: 1, 2, 4 or 8, of which a warp has the
            codes of one, or of two.
        group: of the rows, as of `share_absmax`.
    """
    of_warp = max(1, entries // _registers.WARPS)
    tiles = (entries, group), (of_warp, group), (1, group // LANES_OF_A_ROW)
    warps, lanes = entries // of_warp, ROWS_OF_A_WARP // of_warp
    warp_dims = () if warps == 1 else (-6,)
    if warps < _registers.WARPS:
        warp_dims += (plgpu.Replicated(_registers.WARPS // warps),)
    of_block = () if of_warp == 1 else (-4,)
    return _registers.tiled(tiles, warp_dims, (*of_block, plgpu.Replicated(lanes), -3))


def absmax_layout(rows: int, columns: int) -> Any:
    """Absmax of 128 rows, a row a thread; or of 64, where two threads have the same."""
    of_warp = rows // _registers.WARPS
    tiles = (rows, columns), (of_warp, columns), (1, columns)
    copies = plgpu.Replicated(_registers.LANES // of_warp)
    return _registers.tiled(tiles, (-6,), (-4, copies) if of_warp < 32 else (-4,))


def share_absmax(
    ref: Any, absmax: Float[Array, "rows columns"], group: int | None = None
) -> None:
    """Writes them to shared memory, ``(columns, rows)``, to be read when all have met.

    Pallas itself would have all meet before and afterwards.

    Args:
        ref: where to.
        absmax: in registers of `absmax_layout`.
        group: if given, the rows of each such group lie as `permute` takes them, those
            of a lane next to each other.
    """
    layout = absmax_layout(*absmax.shape)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))

    @inline
    def inlined(_, ref, absmax):
        places = absmax.layout.thread_idxs(absmax.shape)
        for register, (row, _) in zip(absmax.registers.flat, places, strict=True):
            if group:
                row = _before_permute(row, group)
            for column, element in enumerate(_registers.elements_of(register)):
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
    warps = (plgpu.Replicated(_registers.WARPS),)
    return _registers.tiled(((_registers.LANES, 8), (1, 8), (4,)), warps, (-5,))


def apart(sums: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
    """The same, of ``Layout.WGMMA``, held number by number instead of as pairs.

    So that they can be written to neighbouring rows, not columns.
    """
    tiles = plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,)))
    layout = plgpu.Layout.TILED(tiles, (-8,), (-4, -3), -1)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout),
    )

    @inline
    def inlined(_, sums):
        return sums.to_layout(mgpu.fragmented_array.WGMMA_LAYOUT_ACC_32BIT)

    return inlined(sums)


def decode(
    codes: UInt8[Array, "rows half"],
    words: Int32[Array, "32 8"],
    dtype: np.dtype,
) -> Float[Array, "rows group"]:
    """The levels of a group of codes, `permute`d: `decode_twin` of them.

    Args:
        codes: in registers of `codes_layout`.
        words: as `table` returns them, in registers of `table_layout`.
        dtype: bfloat16 or float16.

    Returns:
        In registers of ``Layout.WGMMA``.
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
                for pair in _decode_word(word, lookup)
            ]
            for column, pair in enumerate(pairs):
                fragments[at[0], column, at[1]] = _as_vector(pair, dtype)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(codes, words)


def decode_across(
    codes: UInt8[Array, "rows stored"],
    scale: Float[Array, "entries tile_rows"],
    step: int,
    words: Int32[Array, "8"],
) -> Float[Array, "columns rows"]:
    """The transpose of the decoded rows, its own rows in the order of `in_order`.

    A lane holds the same bytes of two rows that a product takes as a pair. Interleaved,
    they are codes of which `decode` makes pairs, only that it pairs those of two rows.

    Args:
        codes: in registers of `across_layout`.
        scale: of the blocks of a tile, in registers of `scale_layout` and groups of as
            many rows; bfloat16 or float16, as the result.
        step: which group these are.
        words: as `table` returns them, in registers of `table_layout`.

    Returns:
        In registers of ``Layout.WGMMA``.
    """
    (rows, stored), dtype = codes.shape, scale.dtype
    shape = 2 * stored, rows
    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            across_layout(2 * stored),
            scale_layout(scale.shape[0], rows),
            table_layout(),
        ),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )

    @inline
    def inlined(_, codes, scale, words):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), object)
        # (rows, columns in eights, upper or lower eight rows)
        fragments = registers.reshape(shape[0] // 64, rows // 8, 2)
        lookup = [w for r in words.registers.flat for w in words_of(r)]
        pairs_of_rows = codes.registers.reshape(rows // 8, 2)
        scales = words_of(scale.registers.flat[step])
        for at, (first, second) in enumerate(pairs_of_rows):
            pairs = [
                pair
                for word in _interleaved(first, second)
                for pair in _decode_word(word, lookup, OF_ROWS)
            ]
            for column, pair in enumerate(pairs):
                levels = arith.mulf(
                    _as_vector(pair, dtype), _as_vector(scales[at], dtype)
                )
                fragments[column // 2, at, column % 2] = levels
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(codes, scale, words)


def in_order(
    sums: Float32[Array, "columns tokens"], dtype: np.dtype
) -> Float[Array, "tokens columns"]:
    """The transpose of sums with rows as of `decode_across`: of a lane, neighbours.

    Returns:
        In that dtype, in registers of up to 16 bytes.
    """
    columns, tokens = sums.shape
    of_lane = columns // (_registers.WARPS * ROWS_OF_A_WARP)
    vector_size = min(of_lane, 16 // np.dtype(dtype).itemsize)
    # (..., warp, lane of the tokens' pairs, lane of the columns, token, register, 1)
    tiles = (
        (8, columns),
        (8, columns // _registers.WARPS),
        (2, of_lane),
        (1, vector_size),
    )
    out_layout = _registers.tiled(tiles, (-7,), (-5, -6))
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((tokens, columns), sums.dtype, out_layout),
    )

    @inline
    def inlined(_, sums):
        layout = out_layout.to_mgpu()
        # (rows, columns in eights, upper or lower eight rows)
        pairs = sums.registers.reshape(columns // 64, tokens // 8, 2)
        registers = np.empty(layout.registers_shape((tokens, columns)), object)
        of_token = registers.reshape(tokens // 8, 2, of_lane // vector_size)
        vector_type = ir.VectorType.get((vector_size,), ir.F32Type.get())
        for eight in range(tokens // 8):
            held = [_registers.elements_of(r) for r in pairs[:, eight].flat]
            for token, numbers in enumerate(zip(*held, strict=True)):
                for i in range(of_lane // vector_size):
                    neighbours = numbers[i * vector_size :][:vector_size]
                    of_token[eight, token, i] = vector.from_elements(
                        vector_type, neighbours
                    )
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return inlined(sums).astype(dtype)


def _interleaved(*registers: Any) -> list[Any]:
    """The bytes of two registers in turn, as 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)

    low: Any
    high: Any
    if mgpu.utils.bitwidth(registers[0].type) == 32:
        (low,), (high,) = map(words_of, registers)
        orders = 0x5140, 0x7362
    else:
        # Two bytes each, which are in one word first: to mask them would take more.
        i16 = ir.VectorType.get((1,), ir.IntegerType.get_signless(16))
        halves = [_registers.elements_of(vector.bitcast(i16, r)) for r in registers]
        both = "mov.b32 $0, {$1, $2};"
        low = high = llvm.inline_asm(i32, [h for (h,) in halves], both, "=r,h,h")
        orders = (0x3120,)
    return [
        pick_bytes(low, high, arith.constant(i32, ir.IntegerAttr.get(i32, order)))
        for order in orders
    ]


def words_of(register: Any) -> list[Any]:
    """The 32-bit words of a vector."""
    i32 = ir.IntegerType.get_signless(32)
    count = mgpu.utils.bitwidth(register.type) // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), register)
    return [
        vector.extract(words, dynamic_position=[], static_position=[i])
        for i in range(count)
    ]


def _decode_word(
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
    # 0 to 3, the bytes of the first operand, or 4 to 7. As one instruction, of which
    # the compiler would make two: (word >> 1 & 0x44444444) | 0x32103210.
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


def pick_bytes(low: Any, high: Any, selector: Any) -> Any:
    """The four bytes of ``high:low`` that the selector's nibbles number."""
    constraints = "=r,r,r,r"
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(
        i32, [low, high, selector], "prmt.b32 $0, $1, $2, $3;", constraints
    )


def _as_vector(word: Any, dtype: np.dtype) -> Any:
    """A word as the two numbers that it holds."""
    i32 = ir.IntegerType.get_signless(32)
    number = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    one = vector.from_elements(ir.VectorType.get((1,), i32), [word])
    return vector.bitcast(ir.VectorType.get((2,), number), one)
