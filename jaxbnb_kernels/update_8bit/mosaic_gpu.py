"""Which steps the GPU kernel supports."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float

from jaxbnb_kernels import _selection, _tiles
from jaxbnb_kernels.update_8bit.operands import Step

# A warpgroup's registers do not hold enough longer blocks at a time.
BLOCK_SIZES = tuple(2**i for i in range(5, 11))
# Operations that a rule may use: Mosaic GPU or `in_registers` has them.
OPERATIONS = {"abs", "add", "div", "max", "min", "mul", "neg", "rsqrt", "sign", "sqrt"}
OPERATIONS |= {"square", "sub", "and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne"}
OPERATIONS |= {"or", "select_n", "broadcast_in_dim", "convert_element_type"}
OPERATIONS |= {"jit", "pjit"}
UPDATE = _selection.Kernel("update_8bit", "update")


def updater(
    step: Step,
    scalars: list[jax.Array],
    grad: Float[Array, "*shape"],
    param: Float[Array, "*shape"] | None,
) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    size, inner = step.layout.size, grad.shape[step.layout.axis :]
    if size not in BLOCK_SIZES:
        raise NotImplementedError(
            f"mosaic_gpu needs blocks of {BLOCK_SIZES} elements here; got {size}"
        )
    if math.prod(inner) % size:
        raise NotImplementedError(
            f"mosaic_gpu needs whole blocks; {inner} ends with a part of one of {size}"
        )
    _tiles.numbered(grad.size // size)
    for x in (grad,) if param is None else (grad, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"mosaic_gpu does not support {x.dtype}")
    for x in scalars:
        if (x.shape, x.dtype) != ((), jnp.float32):
            raise NotImplementedError(
                f"mosaic_gpu needs float32 scalars; got {x.dtype} of shape {x.shape}"
            )
    if unknown := _operations(step, param is not None) - OPERATIONS:
        raise NotImplementedError(
            f"mosaic_gpu does not support {', '.join(sorted(unknown))} in a rule"
        )
    return UPDATE


@functools.lru_cache(256)
def _operations(step: Step, has_param: bool) -> set[str]:
    """Returns the operations that the rule uses."""
    scalar, value = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (1,)))
    scalars = step.scalars.unflatten([scalar] * step.scalars.num_leaves)
    args = [scalars, value, (value,) * len(step.signed), *([value] * has_param)]
    fn = step.rule.apply_to if has_param else step.rule.apply
    return operations(jax.make_jaxpr(fn)(*args))


def operations(jaxpr: ClosedJaxpr) -> set[str]:
    """Returns a function's primitives by name, and "constants" if it holds arrays."""
    found = {"constants"} if jaxpr.consts else set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        if equation.primitive.name == "sqrt" and not equation.outvars[0].aval.shape:
            found.add("sqrt of a scalar")
        if equation.primitive.name in ("jit", "pjit"):
            found |= operations(equation.params["jaxpr"])
    return found
