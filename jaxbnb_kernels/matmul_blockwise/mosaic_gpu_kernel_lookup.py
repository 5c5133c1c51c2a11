"""How the fused products look up the levels of codes, of 4 or of 8 bits.

The 16 levels of 4-bit codes lie in registers, and permutations of bytes pick them. The
256 levels of 8-bit codes lie in shared memory, which answers a warp at once if each
lane asks another of its 32 banks. So every lane has a table of its own, in its own
bank, whatever the codes are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32, Int32

from jaxbnb_kernels._mosaic_gpu import layouts, memory, pallas
from jaxbnb_kernels._mosaic_gpu.instructions import (
    elements_of,
    pick_bytes,
    words_of,
)
from jaxbnb_kernels._tiles import LANES, WARPS
from jaxbnb_kernels.quantize_blockwise.reference import LINEAR_STEP

# Orders of the low and high bytes of four levels that make two pairs. In `OF_BYTES`, a
# pair is the two codes of a byte, the first in its high half. In `OF_ROWS`, it is the
# first codes of two bytes, and then the second ones.
OF_BYTES, OF_ROWS = (0x4051, 0x6273), (0x7351, 0x6240)
# Order of the bytes of two words that makes a pair of their low halves.
OF_WORDS = 0x5410


@dataclasses.dataclass(frozen=True)
class Lookup:
    """How levels of one kind of codes are looked up.

    The functions below Pallas take the table as `argument` declares it.

    Attributes:
        per_byte: number of codes in a byte.
        argument: what `plgpu.inline_mgpu` takes the table as.
        table: function ``table(levels, dtype)`` that returns the kernel's operand.
        scratch: shared memory that the kernel needs.
        hold: function ``hold(table_ref, *shared_refs)`` of a kernel that returns the
            table.
        pairs: function ``pairs(register, table)`` below Pallas that returns pairs of
            levels, as 32-bit words: of each two neighbouring codes.
        pairs_of_rows: function ``pairs_of_rows(first, second, table)`` that returns a
            pair for each two codes of two registers.
    """

    per_byte: int
    argument: Any
    table: Callable[[np.ndarray, np.dtype], np.ndarray]
    scratch: tuple[Any, ...]
    hold: Callable[..., Any]
    pairs: Callable[[Any, Any], list[Any]]
    pairs_of_rows: Callable[[Any, Any, Any], list[Any]]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a warpgroup's table."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.scratch)


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


def table_layout() -> Any:
    """Returns a layout with a row of a table in each lane, the same in every warp."""
    warps = (plgpu.Replicated(WARPS),)
    return layouts.tiled(((LANES, 8), (1, 8), (4,)), warps, (-5,))


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


def _pairs_of_nibbles(register: Any, table: Any) -> list[Any]:
    lookup = [w for r in table.registers.flat for w in words_of(r)]
    return [pair for word in words_of(register) for pair in decode_word(word, lookup)]


def _pairs_of_rows_of_nibbles(first: Any, second: Any, table: Any) -> list[Any]:
    lookup = [w for r in table.registers.flat for w in words_of(r)]
    return [
        pair
        for word in _interleaved(first, second)
        for pair in decode_word(word, lookup, OF_ROWS)
    ]


def _interleaved(*registers: Any) -> list[Any]:
    """Interleaves the bytes of two registers into 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)

    low: Any
    high: Any
    if mgpu.utils.bitwidth(registers[0].type) == 32:
        (low,), (high,) = map(words_of, registers)
        orders = 0x5140, 0x7362
    else:
        # Two bytes each. Masking them would take more instructions than one joint word.
        i16 = ir.VectorType.get((1,), ir.IntegerType.get_signless(16))
        halves = [elements_of(vector.bitcast(i16, r)) for r in registers]
        both = "mov.b32 $0, {$1, $2};"
        low = high = llvm.inline_asm(i32, [h for (h,) in halves], both, "=r,h,h")
        orders = (0x3120,)
    return [
        pick_bytes(low, high, arith.constant(i32, ir.IntegerAttr.get(i32, order)))
        for order in orders
    ]


def bytes_table(
    levels: Float[np.ndarray, "256"], dtype: np.dtype
) -> Int32[np.ndarray, "256"]:
    """Returns the 16-bit levels, each in the low half of a word."""
    bits = np.asarray(levels, np.float32).astype(dtype).view(np.uint16)
    return bits.astype(np.int32)


def spread(table_ref: Any, shared_ref: Any) -> Any:
    """Copies a `bytes_table` into shared memory, once for each lane, and returns it.

    Entry ``e`` of lane ``l`` is word ``32 e + l``. A warp copies a quarter of the
    entries, and waits for the others.
    """
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))

    @inline
    def inlined(_, table, shared):
        i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        together = 4
        vector_type = ir.VectorType.get((together,), i32)
        entries = 256 // WARPS
        warp = arith.divui(mgpu.utils.thread_idx(), arith.constant(i32, LANES))
        first = arith.muli(warp, arith.constant(i32, entries))
        source = mgpu.utils.getelementptr(memory.address(table), [first], i32)
        target = mgpu.utils.getelementptr(
            mgpu.utils.memref_ptr(shared), [_lane_bytes()], i8
        )
        rows = arith.muli(first, arith.constant(i32, LANES))
        target = mgpu.utils.getelementptr(target, [rows], i32)
        for entry in range(0, entries, together):
            start = mgpu.utils.getelementptr(source, [entry], i32)
            words: Any = llvm.load(vector_type, start, alignment=4 * together)
            for i, word in enumerate(words_of(words)):
                place = mgpu.utils.getelementptr(target, [(entry + i) * LANES], i32)
                llvm.store(word, place)
        mgpu.utils.warpgroup_barrier()

    inlined(table_ref, shared_ref)
    return shared_ref


def _lane_bytes() -> ir.Value:
    """Returns where the bank of this lane starts, in bytes."""
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, LANES))
    return arith.muli(lane, arith.constant(i32, 4))


def _entries(register: Any, shared: ir.Value) -> list[Any]:
    """Looks up the bytes of a register: words with a level in their low halves."""
    i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    start, lane = mgpu.utils.memref_ptr(shared), _lane_bytes()
    # The bits of a byte, times the bytes of an entry's copies.
    to = (4 * LANES).bit_length() - 1
    entries = []
    for word in words_of(register):
        for bit in range(0, 32, 8):
            if bit < to:
                moved = arith.shli(word, arith.constant(i32, to - bit))
            else:
                moved = arith.shrui(word, arith.constant(i32, bit - to))
            offset = arith.andi(moved, arith.constant(i32, 255 << to))
            # One instruction masks this and adds the lane's place.
            offset = arith.ori(offset, lane)
            place = mgpu.utils.getelementptr(start, [offset], i8)
            entries.append(llvm.load(i32, place))
    return entries


def _pairs_of_bytes(register: Any, shared: ir.Value) -> list[Any]:
    entries = _entries(register, shared)
    return _paired(entries[::2], entries[1::2])


def _pairs_of_rows_of_bytes(first: Any, second: Any, shared: ir.Value) -> list[Any]:
    return _paired(_entries(first, shared), _entries(second, shared))


def _paired(firsts: list[Any], seconds: list[Any]) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    order = arith.constant(i32, OF_WORDS)
    return [
        pick_bytes(low, high, order) for low, high in zip(firsts, seconds, strict=True)
    ]


NIBBLES = Lookup(
    per_byte=2,
    argument=table_layout(),
    table=table,
    scratch=(),
    hold=lambda table_ref: pallas.load(table_ref, table_layout()),
    pairs=_pairs_of_nibbles,
    pairs_of_rows=_pairs_of_rows_of_nibbles,
)
BYTES = Lookup(
    per_byte=1,
    argument=plgpu.RefType(),
    table=bytes_table,
    scratch=(plgpu.SMEM((256 * LANES,), jnp.int32),),
    hold=spread,
    pairs=_pairs_of_bytes,
    pairs_of_rows=_pairs_of_rows_of_bytes,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The levels of a matrix's codes.

    Attributes:
        values: 16 or 256 levels between -1 and 1, by code.
        unit: number that multiplies absmax first.
    """

    values: Float[np.ndarray, " levels"]
    unit: float = 1.0

    @classmethod
    def of(cls, codebook: bytes) -> "Levels":
        """Returns the levels of a codebook's bytes; linear int8 does not have any.

        The levels of linear int8 are 128ths, which 16 bits hold exactly.
        """
        if codebook:
            return cls(np.frombuffer(codebook, np.float32))
        codes = np.arange(256, dtype=np.uint8).view(np.int8)
        return cls(codes.astype(np.float32) / 128, float(128 * LINEAR_STEP))

    @property
    def lookup(self) -> Lookup:
        """How a kernel looks them up."""
        return NIBBLES if len(self.values) == 16 else BYTES

    def in_units(
        self, absmax: Float32[Array, "rows columns"]
    ) -> Float32[Array, "rows columns"]:
        """Returns what multiplies the levels of a block."""
        return absmax if self.unit == 1 else absmax * self.unit
