"""How the int8 product holds its operands: codes in the order of the tensor cores.

A warpgroup's product of bytes takes 32 columns of its left operand at a time. Each of
the four lanes that share a row holds four neighbours in either half. As in
`matmul_blockwise`, lanes keep the neighbours that they read, a quarter of a
group of 64 columns each, and the columns of the other operand are permuted instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Float, Float32, Int8, Shaped

from jaxbnb_kernels._mosaic_gpu.instructions import elements_of, pick_bytes, words_of
from jaxbnb_kernels._mosaic_gpu.layouts import LANES_OF_A_ROW
from jaxbnb_kernels._tiles import LANES, WARPS

GROUP = 64
# Columns of a group that a lane holds: 16 bytes of codes.
QUARTER = GROUP // LANES_OF_A_ROW
# Columns that are decoded at a time: more do not fit in registers.
STEP = 32


def codes_layout() -> Any:
    """Returns the layout of codes: rows as `Layout.WGMMA`, a quarter group a lane."""
    tiles = ((64, GROUP), (16, GROUP), (8, GROUP), (QUARTER,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-7,), (-3, -2), -1)


def as_operand(codes: Int8[Array, "rows k"]) -> Int8[Array, "rows k"]:
    """Turns codes in `codes_layout` into a left operand, without any instruction."""
    inline: Any = plgpu.inline_mgpu(
        arg_types=(codes_layout(),),
        return_type=plgpu.ShapeDtypeStruct(
            codes.shape, jnp.int8, plgpu.Layout.WGMMA_8BIT
        ),
    )
    rows, k = codes.shape

    @inline
    def inlined(_, codes):
        layout = mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape((rows, k)), object)
        # (rows, groups, words of a lane, upper or lower eight rows)
        operand = registers.reshape(rows // 64, k // GROUP, QUARTER // 4, 2)
        for at, register in np.ndenumerate(_of_groups(codes)):
            row, group, half = at
            for word, bits in enumerate(words_of(register)):
                operand[row, group, word, half] = _as_bytes(bits)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=True
        )

    return inlined(codes)


def decode(
    codes: Int8[Array, "rows k"],
    scale: Float32[Array, " rows"],
    step: int,
    dtype: np.dtype,
) -> Float[Array, "rows step"]:
    """Decodes ``STEP`` columns of the matrix as a left operand: scale times code.

    Args:
        codes: codes in `codes_layout`.
        scale: scale of each row, in ``Layout.WGMMA.reduce((1,))``.
        step: number of the columns' step, in the order of ``permuted(..., 2)``.
        dtype: bfloat16 or float16, which the product is rounded to.
    """
    shape = codes.shape[0], STEP
    inline: Any = plgpu.inline_mgpu(
        arg_types=(codes_layout(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    group, within = divmod(step, GROUP // STEP)
    words = STEP // LANES_OF_A_ROW // 4

    @inline
    def levels(_, codes):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), object)
        # (rows, pairs of a lane, upper or lower eight rows)
        pairs = registers.reshape(shape[0] // 64, 2 * words, 2)
        f32 = ir.VectorType.get((2,), ir.F32Type.get())
        for (row, half), register in np.ndenumerate(_of_groups(codes)[:, group]):
            step_words = words_of(register)[words * within :][:words]
            floats = [x for word in step_words for x in _as_floats(word)]
            for i in range(2 * words):
                pair = vector.from_elements(f32, floats[2 * i : 2 * i + 2])
                pairs[row, i, half] = pair
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return (levels(codes) * jax.lax.broadcast_in_dim(scale, shape, (0,))).astype(dtype)


def _of_groups(codes: Any) -> np.ndarray:
    """Registers by rows, groups, and upper or lower eight rows."""
    rows, k = codes.shape
    return codes.registers.reshape(rows // 64, k // GROUP, 2)


def _as_bytes(word: Any) -> Any:
    i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    word_vector = vector.from_elements(ir.VectorType.get((1,), i32), [word])
    return vector.bitcast(ir.VectorType.get((4,), i8), word_vector)


def _as_floats(word: Any) -> list[Any]:
    """Converts four signed bytes to float32, in two instructions each.

    The hardware's conversion runs at an eighth of the rate. The byte plus 128, in the
    last bits of 2^23, makes the float 2^23 plus that number.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def constant(value):
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    # Adding 128 modulo 256 flips the sign bit.
    offset = arith.xori(word, constant(0x80808080))
    of_2_23 = constant(0x4B000000)
    floats = []
    for i in range(4):
        bits = pick_bytes(offset, of_2_23, constant(0x7440 + i))
        sum_ = arith.bitcast(f32, bits)
        floats.append(arith.subf(sum_, arith.constant(f32, 2.0**23 + 128)))
    return floats


def row_layout() -> Any:
    """Returns the layout of a row in groups; a lane holds a quarter of a group."""
    # (..., warp, 1, group of the warp, quarter, element)
    return _tiled((QUARTER,), warp_dim=-5, lane_dims=(-3, -2))


def permuted(
    row: Shaped[Array, "groups group"], together: int
) -> Shaped[Array, "groups group"]:
    """Puts columns of a `row_layout` in a product's order, without any instruction.

    A lane holds a quarter of each group, as it does of W. The product takes the first
    ``together`` of each lane, then the second ones: four codes, or two 16-bit numbers.
    Registers do not change, only the columns that they are declared to hold.
    """
    # (..., warp, 1, group of the warp, step, lane, element)
    tile = LANES_OF_A_ROW * together
    out_layout = _tiled((tile,), (together,), warp_dim=-6, lane_dims=(-4, -2))
    inline: Any = plgpu.inline_mgpu(
        arg_types=(row_layout(),),
        return_type=plgpu.ShapeDtypeStruct(row.shape, row.dtype, out_layout),
    )

    @inline
    def inlined(_, row):
        layout = out_layout.to_mgpu()
        registers = np.empty(layout.registers_shape(row.shape), object)
        numbers = [x for r in row.registers.flat for x in elements_of(r)]
        lane_type = ir.VectorType.get((together,), row.mlir_dtype)
        for i in range(registers.size):
            together_ = numbers[together * i :][:together]
            registers.flat[i] = vector.from_elements(lane_type, together_)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=row.is_signed
        )

    return inlined(row)


def _tiled(*tiles: tuple[int], warp_dim: int, lane_dims: tuple[int, int]) -> Any:
    groups_of_warp = LANES // LANES_OF_A_ROW
    groups = WARPS * groups_of_warp
    tiling = plgpu.Tiling(((groups, GROUP), (groups_of_warp, GROUP), *tiles))
    return plgpu.Layout.TILED(tiling, (warp_dim,), lane_dims, -1)
