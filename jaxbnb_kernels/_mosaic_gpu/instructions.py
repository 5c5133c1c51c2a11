"""Instructions below Pallas, on values in registers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float32

from jaxbnb_kernels._architecture import target


def reciprocal(x: Float32[Array, " rows"], layout: Any) -> Float32[Array, " rows"]:
    """Returns 1 / x, rounded to nearest, of an array in that layout.

    A division in Pallas is an approximation, off by a unit in the last place.
    """
    if layout is None:
        return 1.0 / x
    return elementwise("rcp.rn.f32 $0, $1;", x, layout)


def row_absmax(
    values: Float32[Array, "rows columns"],
) -> Float32[Array, " rows"]:
    """Returns max(abs(x)) of each row: NaN if an element is NaN."""
    magnitudes = jnp.abs(values)
    if not target().architecture.is_turing:
        return jnp.max(magnitudes, axis=1)
    # The bits of positive numbers have the same order, and those of NaN come last. The
    # least negative of them, because Pallas takes a maximum of integers by an
    # instruction that Turing lacks too.
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)
    return jax.lax.bitcast_convert_type(-jnp.min(-bits, axis=1), jnp.float32)


def elementwise(
    instruction: str, x: Float32[Array, "*shape"], layout: Any
) -> Float32[Array, "*shape"]:
    """Applies a PTX instruction from float32 to float32 to each element of an array."""
    inline: Any = plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout),
    )

    @inline
    def inlined(_, x):
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            results = [ptx(instruction, element) for element in elements_of(register)]
            registers[at] = vector.from_elements(register.type, results)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=x.layout, _is_signed=None
        )

    return inlined(x)


def elements_of(register: ir.Value) -> list[ir.Value]:
    """Returns the elements of a vector."""
    return [
        vector.extract(register, dynamic_position=[], static_position=[i])
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def ptx(instruction: str, *operands: ir.Value) -> Any:
    """Runs a PTX instruction on float32 registers."""
    constraints = ",".join(["=f"] + ["f"] * len(operands))
    return llvm.inline_asm(ir.F32Type.get(), operands, instruction, constraints)


def words_of(register: Any) -> list[Any]:
    """Returns the 32-bit words of a vector."""
    i32 = ir.IntegerType.get_signless(32)
    count = mgpu.utils.bitwidth(register.type) // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), register)
    return [
        vector.extract(words, dynamic_position=[], static_position=[i])
        for i in range(count)
    ]


def pick_bytes(low: Any, high: Any, selector: Any) -> Any:
    """Picks the four bytes of ``high:low`` that the selector's nibbles number."""
    constraints = "=r,r,r,r"
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(
        i32, [low, high, selector], "prmt.b32 $0, $1, $2, $3;", constraints
    )


def as_vector(word: Any, dtype: np.dtype) -> Any:
    """Returns a word as a vector of the two numbers that it holds."""
    i32 = ir.IntegerType.get_signless(32)
    number = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    words = vector.from_elements(ir.VectorType.get((1,), i32), [word])
    return vector.bitcast(ir.VectorType.get((2,), number), words)
