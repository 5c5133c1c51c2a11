"""How products by ``mma.sync`` hold their operands: both in registers, nothing shared.

A warp's instruction multiplies 16 rows with 8. The four lanes that share a row hold two
neighbours in either half of 16 columns. The order of the columns does not matter to a
sum, as long as both operands have the same. So each of the four lanes reads a quarter
of a group of columns, of both operands, and neither is permuted beforehand.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32, Int32

from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._mosaic_gpu import layouts, memory
from jaxbnb_kernels._mosaic_gpu.instructions import elements_of, ptx, words_of
from jaxbnb_kernels._mosaic_gpu.layouts import LANES_OF_A_ROW, ROWS_OF_A_WARP
from jaxbnb_kernels._tiles import WARPS

# Tiles that run at once, by an H100's multiprocessors: each has registers for three.
CONCURRENT_TILES = 3 * 132
# Rows of W that are decoded at a time, for sums across rows.
STEP = 32
# Columns of an instruction, and how PTX calls their types.
DEPTH = 16
TYPES = {np.dtype(jnp.bfloat16): "bf16", np.dtype(jnp.float16): "f16"}


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of rows of x, and the matrix that each is multiplied with.

    Attributes:
        places: the matrix, the first row, and the row after the last one of each tile,
            if matrices share one x; a tile without rows computes nothing. None if each
            matrix has its own x.
        block_m: rows of a tile.
    """

    places: Int32[Array, "tiles 3"] | None
    block_m: int

    @property
    def operands(self) -> tuple[Array, ...]:
        """Operands that the kernel reads them from."""
        return () if self.places is None else (self.places,)

    def count(self, m: int) -> int:
        """The number of tiles of each x, for ``m`` rows."""
        return -(-m // self.block_m) if self.places is None else len(self.places)

    def padding(self, m: int) -> int:
        """The number of rows that x needs, so that its last tile does not go beyond."""
        return -m % self.block_m if self.places is None else self.block_m

    def place(self, *refs: Any, m: int) -> tuple[Any, Any, Any, Any]:
        """Returns what a warpgroup of the kernel multiplies.

        Args:
            *refs: references to `operands`.
            m: rows of x.

        Returns:
            The numbers of x, of the matrix, of the first row of the tile, and of the
            row where the result ends.
        """
        x, tile = jax.lax.axis_index("matrix"), jax.lax.axis_index("m")
        if self.places is None:
            return x, x, tile * self.block_m, jnp.int32(m)
        (ref,) = refs
        return x, *(ref[tile, field] for field in range(3))

    def last(self, first: Any, last: Any, token: Any, end: Any) -> Any:
        """Returns ``last``, or ``first`` if there is nothing to sum up."""
        return last if self.places is None else jnp.where(token < end, last, first)


def x_layout(group: int) -> Any:
    """Returns the layout of rows of x, a quarter of a group a lane, in every warp."""
    warps = (plgpu.Replicated(WARPS),)
    quarter = group // LANES_OF_A_ROW
    if quarter <= 8:
        return layouts.tiled(((8, group), (1, quarter)), warps, (-4, -3))
    return layouts.tiled(((8, group), (1, quarter), (8,)), warps, (-5, -4))


def absmax_layout(columns: int) -> Any:
    """Returns the layout of absmax: a row's in each lane that has its codes."""
    tiles = (64, columns), (16, columns), (8, columns), (1, columns)
    lanes = -4, plgpu.Replicated(LANES_OF_A_ROW)
    return layouts.tiled(tiles, (-8,), lanes)


def codes_layout(stored: int) -> Any:
    """Returns the layout of ``STEP`` rows of as many bytes, for sums across rows.

    Like `mosaic_gpu_kernel_gradient_fragments.across_layout`, but the four lanes that
    share columns hold a quarter of the rows each.
    """
    lane_bytes = stored // (WARPS * ROWS_OF_A_WARP)
    # (..., warp, lane of the rows, lane of the columns, row, byte)
    tiles = (
        (STEP, stored),
        (STEP, stored // WARPS),
        (STEP // LANES_OF_A_ROW, lane_bytes),
        (1, lane_bytes),
    )
    return layouts.tiled(tiles, (-7,), (-5, -6))


def add_product(
    sums: Float32[Array, "rows tokens"],
    levels: Float[Array, "rows group"],
    x: Float[Array, "tokens group"],
    absmax: Float32[Array, "rows groups"] | None = None,
    number: int = 0,
) -> Float32[Array, "rows tokens"]:
    """Returns ``sums`` plus the product of a group of columns.

    Args:
        sums: sums in registers of ``Layout.WGMMA``, as is the result.
        levels: levels in registers of ``Layout.WGMMA``.
        x: rows in registers of `x_layout`.
        absmax: absmax in registers of `absmax_layout`, which scale the product of each
            row; None for a product as it is.
        number: number of the group, which is its column in ``absmax``.
    """
    (tokens, group), dtype = x.shape, np.dtype(x.dtype)
    wgmma = plgpu.Layout.WGMMA
    scales = [] if absmax is None else [absmax]
    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            wgmma,
            wgmma,
            x_layout(group),
            *(absmax_layout(s.shape[1]) for s in scales),
        ),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, wgmma),
    )

    @inline
    def inlined(_, sums, levels, x, *scales):
        registers = np.empty_like(sums.registers)
        # (rows in 64s, columns in eights, upper or lower eight rows)
        before, after = (
            r.reshape(-1, tokens // 8, 2) for r in (sums.registers, registers)
        )
        left = levels.registers.reshape(-1, group // DEPTH, 4)
        zeros = [arith.constant(ir.F32Type.get(), 0.0)] * 4
        for eight, held in enumerate(x.registers.reshape(tokens // 8, -1)):
            right = [word for register in held for word in words_of(register)]
            for rows in range(len(left)):
                old = [n for r in before[rows, eight] for n in elements_of(r)]
                new = zeros if scales else old
                for at in range(group // DEPTH):
                    a = [words_of(r)[0] for r in left[rows, at]]
                    new = mma(new, a, right[2 * at : 2 * at + 2], dtype)
                for absmax in scales:
                    of_rows = absmax.registers.reshape(-1, 2)[rows]
                    upper, lower = (elements_of(r)[number] for r in of_rows)
                    new = [
                        ptx("fma.rn.f32 $0, $1, $2, $3;", *operands)
                        for operands in zip(
                            new, [upper, upper, lower, lower], old, strict=True
                        )
                    ]
                pair = sums.registers.flat[0].type
                for half in range(2):
                    both = new[2 * half : 2 * half + 2]
                    after[rows, eight, half] = vector.from_elements(pair, both)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=sums.layout, _is_signed=None
        )

    return inlined(sums, levels, x, *scales)


def store_tokens(
    ref: Any, sums: Float[Array, "rows tokens"], token: Any, row: Any, end: Any
) -> None:
    """Writes the transpose of ``sums`` as far as there are tokens.

    For a single row of x, all eight that an instruction takes would be more bytes than
    a block's absmax.

    Args:
        ref: reference ``(tokens, rows)`` to the whole result, in global memory.
        sums: sums in registers of ``Layout.WGMMA``, in the dtype of the result.
        token: number of the first token.
        row: number of the first row; all rows exist.
        end: number of the token after the last one.
    """
    splat = plgpu.Layout.WG_SPLAT
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat, splat)
    )
    _, num_rows = ref.shape

    @inline
    def inlined(_, ref, sums, token, row, end):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        element_type = ir.MemRefType(ref.type).element_type
        bits = mgpu.utils.bitwidth(element_type)
        word, constraint = ir.IntegerType.get_signless(bits), {16: "h", 32: "r"}[bits]
        places = sums.layout.thread_idxs(sums.shape)
        start = memory.address(ref)
        for register, place in zip(sums.registers.flat, places, strict=True):
            at_row, at_token = (
                arith.addi(arith.index_castui(i32, at), first.registers.item())
                for at, first in zip(place, (row, token), strict=True)
            )
            for i, element in enumerate(elements_of(register)):
                at = arith.addi(at_token, arith.constant(i32, i))
                most = end.registers.item()
                exists = arith.cmpi(arith.CmpIPredicate.slt, at, most)
                columns = arith.constant(i64, num_rows)
                offset = arith.muli(arith.extui(i64, at), columns)
                offset = arith.addi(offset, arith.extui(i64, at_row))
                llvm.inline_asm(
                    None,
                    [
                        mgpu.utils.getelementptr(start, [offset], element_type),
                        arith.bitcast(word, element),
                        exists,
                    ],
                    f"@$2 st.global.b{bits} [$0], $1;",
                    f"l,{constraint},b",
                    has_side_effects=True,
                )

    inlined(ref, sums, token, row, end)


def mma(sums: Any, left: Any, right: Any, dtype: np.dtype) -> list[Any]:
    """Adds a product of 16 rows, 16 columns and 8 rows of x: a warp's instruction.

    Args:
        sums: four float32 of the lane.
        left: four words of two numbers: upper and lower rows, in each half of columns.
        right: two words of two numbers.
        dtype: a key of ``TYPES``.
    """
    if target().architecture.is_turing:
        # Two instructions, of one half of columns each.
        sums = _mma(sums, left[:2], right[:1], dtype)
        return _mma(sums, left[2:], right[1:], dtype)
    return _mma(sums, left, right, dtype)


def _mma(sums: Any, left: Any, right: Any, dtype: np.dtype) -> list[Any]:
    f32, kind = ir.F32Type.get(), TYPES[np.dtype(dtype)]
    names = [f"${i}" for i in range(4 + 4 + len(left) + len(right))]
    operands = names[:4], names[8 : 8 + len(left)], names[8 + len(left) :], names[4:8]
    added: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*sums, *left, *right],
        f"mma.sync.aligned.m16n8k{8 * len(right)}.row.col.f32.{kind}.{kind}.f32 "
        + ", ".join("{" + ", ".join(group) + "}" for group in operands)
        + ";",
        ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * (len(left) + len(right))),
    )
    return [llvm.extractvalue(f32, added, [i]) for i in range(4)]


def has_products_of(dtype: np.dtype) -> bool:
    """Whether the GPU's warps multiply numbers of that dtype."""
    return dtype in TYPES and not (
        target().architecture.is_turing and dtype == jnp.bfloat16
    )
