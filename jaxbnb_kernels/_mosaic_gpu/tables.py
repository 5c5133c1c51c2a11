"""Tables in shared memory: codes to levels, and values to the nearest codes.

Each function that inlines code below Pallas has a twin in jnp. The twin is its
specification, and an interpreted kernel runs the twin.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, memref, vector
from jaxtyping import Array, Float32, Int32, Integer, Shaped

from jaxbnb_kernels import _cells
from jaxbnb_kernels._mosaic_gpu.instructions import ptx
from jaxbnb_kernels._tiles import LANES, WARPS


def shared_table(
    table: Shaped[np.ndarray, "*shape"],
) -> Shaped[np.ndarray, " entries"]:
    """Returns a flat table with a whole number of entries for each thread to copy."""
    threads = WARPS * LANES
    return np.resize(table, -(-table.size // threads) * threads)


def look_up(
    codes: Integer[Array, "rows columns"],
    table_ref: Any,
    layout: Any,
) -> Float32[Array, "rows columns"]:
    """Looks up the table's entry for each code. `look_up_twin` is the same in jnp.

    Args:
        codes: uint8, or uint4 with the first of each pair in the high half of its byte,
            in registers of ``layout``.
        table_ref: 16 or 256 float32 entries in shared memory.
        layout: layout of the codes and of the result; None if interpreted.
    """
    if layout is None:
        return look_up_twin(codes, table_ref[...])
    bits = 4 if codes.dtype == jnp.uint4 else 8

    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.float32, layout),
    )

    @inline
    def inlined(_, codes, table):
        registers = np.empty_like(codes.registers)
        for at, register in np.ndenumerate(codes.registers):
            registers[at] = _look_up_register(register, table, bits)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=codes.layout, _is_signed=None
        )

    return inlined(codes, table_ref)


def look_up_twin(
    codes: Integer[Array, "*shape"], table: Float32[Array, " entries"]
) -> Float32[Array, "*shape"]:
    """`look_up` in jnp."""
    if codes.dtype == jnp.uint4:
        pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
        codes = pairs[..., ::-1].reshape(codes.shape)
    return table[codes.astype(jnp.int32)]


def _look_up_register(register: ir.Value, table: ir.Value, bits: int) -> ir.Value:
    """Looks up the entries for a vector of codes."""
    size = ir.VectorType(register.type).shape[0]
    # Taken out of whole words, which the hardware shifts and masks at once.
    word_bits = min(32, size * bits)
    word = ir.IntegerType.get_signless(word_bits)
    words = vector.bitcast(
        ir.VectorType.get((size * bits // word_bits,), word), register
    )
    entries = []
    for i in range(size):
        at, within = divmod(i * bits, word_bits)
        # The first of two 4-bit codes is in the high half of its byte.
        shift = within ^ 4 if bits == 4 else within
        code = vector.extract(words, dynamic_position=[], static_position=[at])
        code = arith.shrui(code, arith.constant(word, shift))
        code = arith.andi(code, arith.constant(word, 2**bits - 1))
        index = arith.index_castui(ir.IndexType.get(), code)
        entries.append(memref.load(table, [index]))
    return vector.from_elements(ir.VectorType.get((size,), ir.F32Type.get()), entries)


def encode(
    x: Float32[Array, "rows columns"],
    table_ref: Any,
    cells: _cells.Cells,
    bits: int,
    layout: Any,
) -> Integer[Array, "rows columns"]:
    """Encodes each ``x`` to the nearest code. `encode_twin` is the same in jnp.

    Args:
        x: numbers up to 1, in registers of ``layout``; a NaN gets any code.
        table_ref: table of the cells, int32 and flat, in shared memory.
        cells: cells of the codebook.
        bits: 8 for uint8, or 4 for uint4 with the first of each pair in the high half
            of its byte.
        layout: layout of ``x`` and of the result; None if interpreted.
    """
    if layout is None:
        return encode_twin(x, table_ref[...], cells, bits)
    dtype = jnp.uint4 if bits == 4 else jnp.uint8
    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout),
    )

    @inline
    def inlined(_, x, table):
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            registers[at] = _encode_register(register, table, cells, bits)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=x.layout, _is_signed=False
        )

    return inlined(x, table_ref)


def encode_twin(
    x: Float32[Array, "*shape"],
    table: Int32[Array, " entries"],
    cells: _cells.Cells,
    bits: int,
) -> Integer[Array, "*shape"]:
    """`encode` in jnp."""
    codes = _cells.encode(x, cells, table.reshape(-1, 2))
    if bits == 8:
        return codes.astype(jnp.uint8)
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., ::-1].reshape(codes.shape).astype(jnp.uint4)


def _encode_register(
    register: ir.Value, table: ir.Value, cells: _cells.Cells, bits: int
) -> ir.Value:
    """Encodes a vector of floats to a vector of codes."""
    i32 = ir.IntegerType.get_signless(32)
    size = ir.VectorType(register.type).shape[0]
    word_bits = min(32, size * bits)
    words = []
    for i in range(size):
        at, within = divmod(i * bits, word_bits)
        # The first of two 4-bit codes is in the high half of its byte.
        shift = within ^ 4 if bits == 4 else within
        x = vector.extract(register, dynamic_position=[], static_position=[i])
        code = _encode_element(x, table, cells, bits)
        code = arith.shli(code, arith.constant(i32, shift))
        words[at:] = [arith.ori(words[at], code) if at < len(words) else code]
    word = ir.IntegerType.get_signless(word_bits)
    if word_bits < 32:
        words = [arith.trunci(word, w) for w in words]
    packed = vector.from_elements(ir.VectorType.get((len(words),), word), words)
    code_type = ir.IntegerType.get_signless(bits)
    return vector.bitcast(ir.VectorType.get((size,), code_type), packed)


def _encode_element(
    x: ir.Value, table: ir.Value, cells: _cells.Cells, bits: int
) -> ir.Value:
    """`_cells.encode` of one float32."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def constant(value):
        return arith.constant(i32, value)

    magnitude = math.absf(x) if cells.is_signed else x
    # In PTX the maximum of a number and NaN is the number. LLVM's own takes four
    # instructions.
    lowest = arith.constant(f32, cells.lowest)
    magnitude = ptx("max.f32 $0, $1, $2;", magnitude, lowest)
    cell = arith.shrui(arith.bitcast(i32, magnitude), constant(cells.shift))
    if cells.is_signed:
        sign = arith.shrsi(arith.bitcast(i32, x), constant(31))
        cell = arith.addi(cell, arith.andi(sign, constant(cells.per_sign)))
    # The constant part of this byte offset becomes an immediate of the read.
    start = mgpu.utils.memref_ptr(table)
    entry = mgpu.utils.getelementptr(start, [cell], ir.IntegerType.get_signless(64))
    entry = mgpu.utils.getelementptr(
        entry, [-cells.first], ir.IntegerType.get_signless(64)
    )
    pair = llvm.load(ir.VectorType.get((2,), i32), entry, alignment=8)
    point = vector.extract(pair, dynamic_position=[], static_position=[0])
    codes = vector.extract(pair, dynamic_position=[], static_position=[1])
    is_above = arith.cmpf(arith.CmpFPredicate.OGT, x, arith.bitcast(f32, point))
    above = arith.shrui(codes, constant(_cells.ABOVE_SHIFT))
    chosen = arith.select(is_above, above, codes)
    return arith.andi(chosen, constant(2**bits - 1))
