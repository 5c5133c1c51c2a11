"""How kernels are called: chosen for the device, and divided among devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels.update_8bit import cpu, mosaic_gpu, reference, xla
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment
from jaxbnb_kernels.update_8bit.operands import Step, by_name, by_rule


def update(
    rule,
    scalars,
    grad: Float[Array, "*shape"],
    moments,
    layout: BlockLayout,
    param,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """See `update_8bit`; raises an error if no kernel of these kinds supports the call.

    Without ``kinds``, the code is XLA's.
    """
    leaves, structure = jax.tree.flatten(scalars)
    leaves = [jnp.asarray(x) for x in leaves]
    step = Step(rule, structure, tuple(m.signed for m in moments), layout)
    arguments = step, leaves, grad, param
    kernels = ()
    if kinds:
        kernels = _selection.serving(
            kinds,
            mosaic_gpu=lambda: mosaic_gpu.updater(*arguments),
            cpu=lambda: cpu.updater(*arguments),
        )
    # A kernel cannot have an empty operand.
    packed = jnp.stack(leaves) if leaves else jnp.zeros(1)
    params = () if param is None else (param,)
    codes, absmax = [m.codes for m in moments], [m.absmax for m in moments]
    result, *state = _update(
        (packed, grad, *params, *codes, *absmax), step, kernels, is_required
    )
    codes, absmax = state[: len(moments)], state[len(moments) :]
    return result, tuple(map(Moment, codes, absmax, step.signed))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _update(arrays, step: Step, kernels, is_required: bool):
    return _selection.choose(
        kernels,
        _update_portable,
        *arrays,
        is_required=is_required,
        divided=_update_divided,
        whole=_update_whole,
        step=step,
    )


@_update.defjvp
def _update_jvp(step, kernels, is_required, primals, tangents):
    def portable(arrays):
        return _update_portable(*arrays, step=step)

    # From xla, because jax can transpose that. The values it recomputes are not used.
    _, change = jax.jvp(portable, primals, tangents)
    return _update(*primals, step, kernels, is_required), change


def _update_portable(scalars, *arrays, step: Step):
    return _update_with(xla.update, scalars, *arrays, step=step)


def _update_whole(scalars, *arrays, step: Step):
    # The compiler would gather all arrays for the loop of xla.
    return _update_with(reference.update, scalars, *arrays, step=step)


def _update_with(update, scalars, *arrays, step: Step):
    if scalars.ndim > 1:
        call = functools.partial(_update_with, update, step=step)
        return jax.vmap(call)(scalars, *arrays)
    grad, param, codes, absmax = by_name(arrays, len(step.signed))
    result, moments = update(
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
    # Blocks run along one axis, and a block spans all later axes.
    axis = examples + step.layout.axis
    # A last block that is short would be another one in a part.
    is_whole = arrays[0].shape[axis] % step.layout.step == 0
    outer = axis + 1 if is_whole else axis
    names = *_partition.leading(outer), *[None] * (arrays[0].ndim - outer)
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
