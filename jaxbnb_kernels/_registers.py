"""How Mosaic GPU kernels hold blocks in registers, and look up tables from there.

Each function that inlines code below Pallas has a twin in jnp: its specification, and
what an interpreted kernel runs.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array, Float32, Integer

WARPS = 4
LANES = 32


def rows_layout(columns: int, vector_size: int) -> Any:
    """Rows of ``columns`` elements, each in the lanes of one warp.

    A lane holds ``vector_size`` neighbours, so that a warp reads and writes whole
    cache lines, and a row's maximum needs no other warp. An array has a multiple of
    ``tile_rows(columns, vector_size)`` rows.
    """
    width = min(columns, LANES * vector_size)
    rows = tile_rows(columns, vector_size) // WARPS
    # (..., warp, 1, row, lane of the row, element of the lane)
    layout = mgpu.TiledLayout(
        plgpu.Tiling(((WARPS * rows, width), (rows, width), (vector_size,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


def tile_rows(columns: int, vector_size: int) -> int:
    """How many rows the four warps of a `rows_layout` hold side by side."""
    return WARPS * max(1, LANES * vector_size // columns)


def look_up(
    codes: Integer[Array, "rows columns"],
    table_ref: Any,
    layout: Any,
) -> Float32[Array, "rows columns"]:
    """The table's entry for each code, `look_up_twin` of them.

    Args:
        codes: uint4, of which the first of each pair lies in the high half of its
            byte, or uint8; in registers of that layout.
        table_ref: float32, 16 or 256 entries in shared memory.
        layout: of the codes and of the result; None where interpreted.
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
    """A vector of codes to a vector of entries."""
    size = ir.VectorType(register.type).shape[0]
    # Bits are taken out of whole words, which the hardware shifts and masks at once.
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
