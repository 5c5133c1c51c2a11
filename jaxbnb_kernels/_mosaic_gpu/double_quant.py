"""Doubly quantised absmax in Mosaic GPU kernels, which decode them as they read them.

absmax = level[code] * nested_absmax + offset. Kernels read the same few nested absmax
and levels over and over, so reads hit the first-level cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float32, Int32, UInt8

from jaxbnb_kernels._mosaic_gpu import memory
from jaxbnb_kernels._mosaic_gpu.instructions import elements_of, ptx
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.quantize_blockwise.reference import NESTED_BLOCK_SIZE


def decode(
    codes: UInt8[Array, "rows *columns"],
    first: Int32[Array, ""],
    stride: int,
    nested_ref: Any,
    offset: Float32[Array, ""],
    levels_ref: Any,
    layout: Any,
) -> Float32[Array, "rows *columns"]:
    """Decodes the absmax of a tile of a matrix. `decode_twin` is the same in jnp.

    Args:
        codes: codes in registers of ``layout``. No register crosses a nested block.
        first: number of the tile's first absmax in the matrix.
        stride: distance from an absmax to the one in the next row. The absmax of a row
            are contiguous.
        nested_ref: nested absmax of the matrix, in global memory.
        offset: offset of the matrix.
        levels_ref: the 256 levels of the signed dynamic map, in global memory.
        layout: layout of the codes and of the result; None if interpreted.
    """
    if layout is None:
        return decode_twin(
            codes, first, stride, nested_ref[...], offset, levels_ref[...]
        )
    splat = plgpu.Layout.WG_SPLAT
    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout, splat, plgpu.RefType(), splat, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.float32, layout),
    )

    @inline
    def inlined(_, codes, first, nested, offset, levels):
        first, offset = first.registers.item(), offset.registers.item()
        registers = np.empty_like(codes.registers)
        places = codes.layout.thread_idxs(codes.shape)
        for (at, register), place in zip(
            np.ndenumerate(codes.registers), places, strict=True
        ):
            number = _number(first, place, stride)
            shift = arith.constant(number.type, NESTED_BLOCK_SIZE.bit_length() - 1)
            nested_scale = _entry(nested, arith.shrui(number, shift))
            registers[at] = _decode_register(register, nested_scale, offset, levels)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=codes.layout, _is_signed=None
        )

    return inlined(codes, first, nested_ref, offset, levels_ref)


def decode_twin(
    codes: UInt8[Array, "rows *columns"],
    first: Int32[Array, ""],
    stride: int,
    nested_absmax: Float32[Array, " nested"],
    offset: Float32[Array, ""],
    levels: Float32[Array, "256"],
) -> Float32[Array, "rows *columns"]:
    """`decode` in jnp."""
    row, *column = jnp.indices(codes.shape)
    number = first + stride * row + sum(column)
    nested_scale = nested_absmax[number // NESTED_BLOCK_SIZE]
    return levels[codes.astype(jnp.int32)] * nested_scale + offset


def operands(
    nested: Sequence[Float32[Array, "count 1 entries"]], num_absmax: int
) -> tuple[Array, ...]:
    """Returns the operands of a product's kernel that `decoder` decodes with.

    Args:
        nested: nested absmax and offset, if any; a row for each matrix.
        num_absmax: absmax of a matrix, with those of rows that the kernel pads it with.
            Zeros are appended until there are enough nested absmax for these too.
    """
    if not nested:
        return ()
    nested_absmax, offset = nested
    missing = -(-num_absmax // NESTED_BLOCK_SIZE) - nested_absmax.shape[-1]
    nested_absmax = jnp.pad(nested_absmax, ((0, 0), (0, 0), (0, max(0, missing))))
    return nested_absmax, offset, jnp.asarray(DYNAMIC8_SIGNED)


def decoder(
    refs: Sequence[Any], matrix: Any, stride: int, layout: Any
) -> Callable[[Any, Any], Any]:
    """Returns a function that decodes the absmax of a tile, given the first's number.

    Args:
        refs: references to `operands`. Without any, absmax stay as they are.
        matrix: number of the matrix.
        stride: see `decode`.
        layout: see `decode`.
    """
    if not refs:
        return lambda absmax, _: absmax
    nested_ref, offset_ref, levels_ref = refs
    offset = offset_ref[matrix, 0, 0]
    of_matrix = nested_ref.at[matrix, 0]
    return lambda codes, first: decode(
        codes, first, stride, of_matrix, offset, levels_ref, layout
    )


def _number(first: ir.Value, place: Any, stride: int) -> ir.Value:
    """Returns the number of an absmax in the matrix."""
    i32 = first.type
    row, *column = (arith.index_castui(i32, index) for index in place)
    number = arith.addi(first, arith.muli(row, arith.constant(i32, stride)))
    return arith.addi(number, column[0]) if column else number


def _entry(ref: ir.Value, index: ir.Value) -> Any:
    """Reads a float32 from global memory."""
    f32 = ir.F32Type.get()
    address = mgpu.utils.getelementptr(memory.address(ref), [index], f32)
    return llvm.load(f32, address)


def _decode_register(
    register: ir.Value, nested_scale: Any, offset: ir.Value, levels: ir.Value
) -> ir.Value:
    """Decodes a vector of codes to a vector of absmax."""
    i32 = ir.IntegerType.get_signless(32)
    absmax = []
    for code in elements_of(register):
        level = _entry(levels, arith.extui(i32, code))
        # Rounded twice, as specified. The compiler would make these one instruction.
        scaled = ptx("mul.rn.f32 $0, $1, $2;", level, nested_scale)
        absmax.append(ptx("add.rn.f32 $0, $1, $2;", scaled, offset))
    f32 = ir.F32Type.get()
    return vector.from_elements(ir.VectorType.get((len(absmax),), f32), absmax)
