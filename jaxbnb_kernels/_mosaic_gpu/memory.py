"""Moves tables, and rows that may be beyond the end of an array.

Pallas moves whole tiles. A kernel that writes in place cannot let its last tile overlap
the one before it, because it would update those rows twice.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, Shaped

from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._mosaic_gpu.instructions import elements_of
from jaxbnb_kernels._tiles import LANES, WARPS

# Bytes that one thread copies at once, where the table is long enough.
_COPIED_BYTES = 16


def load_rows(ref: Any, num_rows: Any, layout: Any) -> Shaped[Array, "rows *columns"]:
    """Reads the first ``num_rows`` rows of ``ref``; the others have any values.

    Args:
        ref: contiguous rows in global memory. They may reach beyond the end of the
            array, where nothing is read.
        num_rows: int32 scalar.
        layout: layout of the registers, of 4, 8 or 16 bytes each.
    """
    dtype = ref.dtype
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(ref.shape, dtype, layout),
    )

    @inline
    def inlined(_, ref, num_rows):
        ref_type, tiled = ir.MemRefType(ref.type), layout.to_mgpu()
        shape = tuple(ref_type.shape)
        register_type = tiled.registers_element_type(ref_type.element_type)
        registers = np.empty(tiled.registers_shape(shape), object)
        places = _places(ref, shape, tiled, num_rows)
        for at, place in zip(np.ndindex(registers.shape), places, strict=True):
            registers[at] = _load(register_type, place)
        return mgpu.FragmentedArray(
            _registers=registers,
            _layout=tiled,
            _is_signed=mgpu.utils.is_signed(dtype),
        )

    return inlined(ref, num_rows)


def store_rows(
    ref: Any,
    rows: Shaped[Array, "rows *columns"],
    num_rows: Any,
    layout: Any,
    pitch: int | None = None,
) -> None:
    """Writes the first ``num_rows`` of ``rows`` where `load_rows` reads them.

    Args:
        ref: see `load_rows`.
        rows: rows in registers of ``layout``.
        num_rows: int32 scalar.
        layout: layout of the registers.
        pitch: distance from a row to the next in elements; None if they are contiguous.
    """
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout, plgpu.Layout.WG_SPLAT)
    )

    @inline
    def inlined(_, ref, rows, num_rows):
        places = _places(ref, rows.shape, rows.layout, num_rows, pitch)
        for register, place in zip(rows.registers.flat, places, strict=True):
            _store(register, place)

    inlined(ref, rows, num_rows)


def barrier() -> None:
    """Waits until all threads have written to shared memory.

    Unlike ``plgpu.commit_smem``, this does not order them with the matrix instructions
    that read shared memory, which only Hopper has.
    """
    inline: Any = plgpu.inline_mgpu(arg_types=())

    @inline
    def inlined(_):
        mgpu.utils.warpgroup_barrier()

    inlined()


def copy_tables(table_refs: Sequence[Any], shared_refs: Sequence[Any]) -> None:
    """Copies each `shared_table` of 4-byte entries into shared memory.

    All copies run at the same time and bypass the registers, except on Turing. Through
    registers, they would need more of them than everything else.
    """
    refs = (*table_refs, *shared_refs)
    is_turing = target().architecture.is_turing
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))

    @inline
    def inlined(_, *refs):
        half = len(refs) // 2
        for table, shared in zip(refs[:half], refs[half:], strict=True):
            _copy(table, shared, _copy_now if is_turing else _copy_later)
        if not is_turing:
            nvvm.cp_async_commit_group()
            nvvm.cp_async_wait_group(0)
        mgpu.utils.warpgroup_barrier()

    inlined(*refs)


def _copy_later(target: ir.Value, source: ir.Value, num_bytes: int) -> None:
    kinds = nvvm.LoadCacheModifierKind
    # Only wide copies can bypass the first-level cache.
    kind = kinds.CG if num_bytes == _COPIED_BYTES else kinds.CA
    nvvm.cp_async_shared_global(target, source, num_bytes, kind)


def _copy_now(target: ir.Value, source: ir.Value, num_bytes: int) -> None:
    i32 = ir.IntegerType.get_signless(32)
    words = ir.VectorType.get((num_bytes // 4,), i32)
    llvm.store(llvm.load(words, source, alignment=num_bytes), target)


def _copy(
    table: ir.Value, shared: ir.Value, copy: Callable[[ir.Value, ir.Value, int], None]
) -> None:
    i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    source, target = address(table), mgpu.utils.memref_ptr(shared)
    table_bytes = 4 * ir.MemRefType(table.type).shape[0]
    threads, start = WARPS * LANES, 0
    while start < table_bytes:
        is_wide = start + _COPIED_BYTES * threads <= table_bytes
        num_bytes = _COPIED_BYTES if is_wide else 4
        at = arith.muli(mgpu.utils.thread_idx(), arith.constant(i32, num_bytes))
        at = arith.addi(at, arith.constant(i32, start))
        to = mgpu.utils.getelementptr(target, [at], i8)
        copy(to, mgpu.utils.getelementptr(source, [at], i8), num_bytes)
        start += num_bytes * threads


def address(ref: ir.Value) -> ir.Value:
    """Returns where ``ref`` starts, as an address that the GPU knows to be global."""
    return llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(ref))


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place in memory of the elements of a register.

    Attributes:
        address: address of the elements in the thread's first register.
        offset: distance from there, in bytes.
        exists: whether the row exists.
    """

    address: ir.Value
    offset: int
    exists: ir.Value


def _places(
    ref: ir.Value,
    shape: tuple[int, ...],
    layout: Any,
    num_rows: Any,
    pitch: int | None = None,
) -> Iterator[_Place]:
    """Yields the place of each register, in order."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    element_type = ir.MemRefType(ref.type).element_type
    element_bytes = mgpu.utils.bitwidth(element_type) // 8
    columns = math.prod(shape[1:]) if pitch is None else pitch
    row, *column = (
        arith.index_castui(i32, index) for index in next(layout.thread_idxs(shape))
    )
    at = arith.muli(row, arith.constant(i32, columns))
    for index in column:
        at = arith.addi(at, index)
    start = mgpu.utils.getelementptr(address(ref), [arith.extui(i64, at)], element_type)
    in_row = mgpu.utils.get_contiguous_strides(shape)[1:]
    strides = layout.tiling.tile_strides((columns, *in_row))
    for register in np.ndindex(layout.registers_shape(shape)):
        # A thread's other registers are a constant number of elements away.
        distance = sum(i * stride for i, stride in zip(register, strides, strict=True))
        last = arith.addi(row, arith.constant(i32, distance // columns))
        exists = arith.cmpi(arith.CmpIPredicate.slt, last, num_rows.registers.item())
        yield _Place(start, distance * element_bytes, exists)


def _load(register_type: Any, place: _Place) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    words, suffix, names = _access(register_type, first=0)
    loaded: Any = llvm.inline_asm(
        i32 if words == 1 else llvm.StructType.get_literal([i32] * words),
        [place.address, place.exists],
        f"@${words + 1} ld.global{suffix} {names}, [${words}+{place.offset}];",
        ",".join(["=r"] * words + ["l", "b"]),
        has_side_effects=True,
    )
    parts = [loaded]
    if words > 1:
        parts = [llvm.extractvalue(i32, loaded, [i]) for i in range(words)]
    packed = vector.from_elements(ir.VectorType.get((words,), i32), parts)
    return vector.bitcast(register_type, packed)


def _store(register: ir.Value, place: _Place) -> None:
    i32 = ir.IntegerType.get_signless(32)
    words, suffix, names = _access(register.type, first=2)
    packed = vector.bitcast(ir.VectorType.get((words,), i32), register)
    llvm.inline_asm(
        None,
        [place.address, place.exists, *elements_of(packed)],
        f"@$1 st.global{suffix} [$0+{place.offset}], {names};",
        ",".join(["l", "b"] + ["r"] * words),
        has_side_effects=True,
    )


def _access(register_type: Any, first: int) -> tuple[int, str, str]:
    """Returns a register's words, its PTX type, and its operands from ``first`` on."""
    vector_type = ir.VectorType(register_type)
    bits = mgpu.utils.bitwidth(vector_type.element_type)
    words = vector_type.shape[0] * bits // 32
    names = [f"${first + i}" for i in range(words)]
    if words == 1:
        return 1, ".b32", names[0]
    return words, f".v{words}.b32", "{" + ", ".join(names) + "}"
