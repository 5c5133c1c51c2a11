"""Which steps the GPU kernel supports, and how they are divided among devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels.update_8bit import xla
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment
from jaxbnb_kernels.update_8bit.operands import Step, by_name, by_rule

# A warpgroup's registers do not hold enough longer blocks at a time.
BLOCK_SIZES = tuple(2**i for i in range(5, 11))
# Operations that a rule may use: Mosaic GPU or `in_registers` has them.
OPERATIONS = {"abs", "add", "div", "max", "min", "mul", "neg", "rsqrt", "sign", "sqrt"}
OPERATIONS |= {"square", "sub", "and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne"}
OPERATIONS |= {"or", "select_n", "broadcast_in_dim", "convert_element_type"}
OPERATIONS |= {"jit", "pjit"}
UPDATE = _selection.Kernel("update_8bit", "update")


def update(
    rule,
    scalars,
    grad: Float[Array, "*shape"],
    moments,
    layout: BlockLayout,
    param,
    *,
    is_required: bool = True,
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """See `update_8bit`; raises an error if no kernel supports the call."""
    leaves, structure = jax.tree.flatten(scalars)
    leaves = [jnp.asarray(x) for x in leaves]
    step = Step(rule, structure, tuple(m.signed for m in moments), layout)
    _check(step, leaves, grad, param)
    # A kernel cannot have an empty operand.
    packed = jnp.stack(leaves) if leaves else jnp.zeros(1)
    params = () if param is None else (param,)
    codes, absmax = [m.codes for m in moments], [m.absmax for m in moments]
    result, *state = _update(
        (packed, grad, *params, *codes, *absmax), step, is_required
    )
    codes, absmax = state[: len(moments)], state[len(moments) :]
    return result, tuple(map(Moment, codes, absmax, step.signed))


def _check(step: Step, scalars: list[jax.Array], grad, param) -> None:
    """Raises an error if no kernel supports the call."""
    size, inner = step.layout.size, grad.shape[step.layout.axis :]
    if size not in BLOCK_SIZES:
        raise NotImplementedError(
            f"mosaic_gpu needs blocks of {BLOCK_SIZES} elements here; got {size}"
        )
    if math.prod(inner) % size:
        raise NotImplementedError(
            f"mosaic_gpu needs whole blocks; {inner} ends with a part of one of {size}"
        )
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


@functools.lru_cache(256)
def _operations(step: Step, has_param: bool) -> set[str]:
    """Returns the operations that the rule uses."""
    scalar, value = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (1,)))
    scalars = step.scalars.unflatten([scalar] * step.scalars.num_leaves)
    args = [scalars, value, (value,) * len(step.signed), *([value] * has_param)]
    fn = step.rule.apply_to if has_param else step.rule.apply
    return operations(jax.make_jaxpr(fn)(*args))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _update(arrays, step: Step, is_required: bool):
    return _selection.choose(
        UPDATE,
        _update_portable,
        *arrays,
        is_required=is_required,
        divided=_update_divided,
        step=step,
    )


@_update.defjvp
def _update_jvp(step, is_required, primals, tangents):
    def portable(arrays):
        return _update_portable(*arrays, step=step)

    # From xla, because jax can transpose that. The values it recomputes are not used.
    _, change = jax.jvp(portable, primals, tangents)
    return _update(*primals, step, is_required), change


def _update_portable(scalars, *arrays, step: Step):
    portable = functools.partial(_update_portable, step=step)
    if scalars.ndim > 1:
        return jax.vmap(portable)(scalars, *arrays)
    grad, param, codes, absmax = by_name(arrays, len(step.signed))
    result, moments = xla.update(
        step.rule,
        by_rule(scalars, step),
        grad,
        tuple(map(Moment, codes, absmax, step.signed)),
        step.layout,
        param,
    )
    return [result, *(m.codes for m in moments), *(m.absmax for m in moments)]


def _update_divided(kernel, scalars, *arrays, step: Step):
    examples = scalars.ndim - 1
    # Axes up to the one that blocks run along. A block spans all later axes.
    outer = examples + step.layout.axis + 1
    inner = arrays[0].ndim - outer
    names = *_partition.leading(outer), *[None] * inner
    scalar_names = *_partition.leading(examples), None
    axes = _partition.Axes(
        (scalar_names, *[names] * len(arrays)), (names,) * (1 + 2 * len(step.signed))
    )

    def update_part(scalars, *arrays):
        *_, absmax = arrays
        layout = dataclasses.replace(step.layout, absmax_shape=absmax.shape[examples:])
        part = dataclasses.replace(step, layout=layout)
        return kernel(scalars, *arrays, step=part)

    return _partition.divide(update_part, axes, scalars, *arrays)


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
