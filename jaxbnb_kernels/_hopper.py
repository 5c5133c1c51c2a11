"""Where kernels for Hopper run: what is lowered for such a GPU, once they were tried.

Which device a computation is for is known when it is lowered, not when it is traced:
so a primitive carries both the kernel and the portable function, and its lowering
chooses. What is exported for a machine that is not there is for the device that JAX's
context names, `jax.sharding.AbstractDevice`.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxbnb_kernels import _partition, _trial

_VARIABLE: Final = "JAXBNB_MOSAIC_GPU"
# "": a kernel runs on a GPU of this machine where `_trial` found its numbers right.
# "1": it runs untried. "0": only where it is asked for by name.
SETTING: Final = os.environ.get(_VARIABLE, "")
if SETTING not in ("", "0", "1"):
    raise ValueError(f"{_VARIABLE} is 0, 1, or not set; got {SETTING!r}")
CAPABILITY: Final = "9.0"
# What NVIDIA calls them: of a device that is only described, nothing else is known.
_HOPPER_KIND: Final = re.compile(r"\bG?H(20|100|200|800)\b")
_NEEDS = f"mosaic_gpu needs a GPU of compute capability {CAPABILITY}"


def run(
    kernel: Callable[..., Sequence[jax.Array]],
    portable: Callable[..., Sequence[jax.Array]],
    *arrays: jax.Array,
    required: bool,
    broadcast: bool = True,
    divided: Callable[..., Sequence[jax.Array]] | None = None,
    **static: Any,
) -> list[jax.Array]:
    """``kernel(*arrays, **static)`` on Hopper, ``portable`` of the same elsewhere.

    Args:
        kernel: takes arrays of the same leading axes, as does ``portable``.
        portable: returns arrays of the same shapes and dtypes as ``kernel``.
        *arrays: their arrays.
        required: raise where the kernel cannot run, instead of running ``portable``.
        broadcast: in a mapped call, repeat the arrays that are not mapped; if not,
            the functions take those with axes of one.
        divided: the kernel by `_partition.divide`, for arrays that the compiler divides
            among devices; None if it cannot.
        **static: their hashable keyword arguments.

    Raises:
        NotImplementedError: the kernel is required, and what it is lowered for is no
            GPU of compute capability 9.0, or several that it cannot be divided among;
            or the arrays are sharded explicitly.
    """
    if any(axis is not None for x in arrays for axis in jax.typeof(x).sharding.spec):
        raise NotImplementedError("kernels divide no arrays: call it within shard_map")
    return _choose_p.bind(
        *arrays,
        kernel=kernel,
        portable=portable,
        divided=divided,
        required=required,
        broadcast=broadcast,
        static=tuple(static.items()),
    )


def over_leading_axes(
    function: Callable[..., Any], count: int, *arrays: jax.Array
) -> Any:
    """``function`` mapped over as many leading axes, of one in arrays without them."""
    if not count:
        return function(*arrays)
    is_alone = [len(a) == 1 for a in arrays]
    if all(is_alone):
        is_alone = [False] * len(arrays)
    axes = tuple(None if alone else 0 for alone in is_alone)
    arrays = tuple(
        a[0] if alone else a for a, alone in zip(arrays, is_alone, strict=True)
    )
    inner = functools.partial(over_leading_axes, function, count - 1)
    return jax.vmap(inner, axes)(*arrays)


_choose_p = Primitive("hopper_or_portable")
_choose_p.multiple_results = True
_compiled = jax.jit(
    _choose_p.bind,
    static_argnames=(
        "kernel",
        "portable",
        "divided",
        "required",
        "broadcast",
        "static",
    ),
)


@_choose_p.def_impl
def _run_by_itself(*arrays, **params):
    # What is chosen when it is lowered has to be, also where nothing else is compiled.
    with jax.disable_jit(False):
        return _compiled(*arrays, **params)


@_choose_p.def_abstract_eval
def _shapes(*arrays, portable, static, **_):
    # With the axes of shard_map along which they vary.
    traced = jax.make_jaxpr(functools.partial(portable, **dict(static)))(*arrays)
    return traced.out_avals


def _lower(ctx, *arrays, kernel, portable, divided, required, static, **_):
    context = ctx.module_context
    is_partitioned = _is_partitioned(context.axis_context)
    reason = _why_not(context, kernel, required)
    if reason is None and is_partitioned:
        reason = _why_not_divided(context, divided)
    if reason and required:
        raise NotImplementedError(reason)
    chosen = portable if reason else divided if is_partitioned else kernel
    call = functools.partial(_call, function=chosen, static=static)
    if chosen is kernel:
        # To which it is nothing that its arrays vary along axes of a shard_map.
        return _partition.lower_alone(ctx, call, *arrays)
    if chosen is divided:
        ctx = _on_halves(ctx)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *arrays)


# Compiled, so that it is traced and lowered once for all arrays of the same shapes.
@functools.partial(jax.jit, static_argnames=("function", "static"))
def _call(*arrays, function, static):
    return function(*arrays, **dict(static))


mlir.register_lowering(_choose_p, _lower)


def _why_not(
    context: mlir.ModuleContext, kernel: Callable[..., Any], required: bool
) -> str | None:
    """Why a kernel for Hopper is not to be lowered here, or None.

    For a GPU that nobody named it is, if it is required: its machine code runs on no
    other one.
    """
    if tuple(context.platforms) != ("cuda",):
        return f"{_NEEDS}; this is lowered for {', '.join(context.platforms)}"
    devices = context.backend.devices() if context.backend else []
    if not devices or devices[0].platform == "cpu":
        # Another machine's GPU is lowered for, as jax.export does.
        device: Any = jax.sharding.get_abstract_mesh().abstract_device
        devices = [] if device is None or device.platform == "cpu" else [device]
    device = devices[0] if devices else None
    if device is None:
        reason = None if required else f"{_NEEDS}; this one's is unknown"
    else:
        # Of a program is not said which of several it is for.
        reason = next(filter(None, map(why_not_on, devices)), None)
    if reason is not None:
        return reason
    if required or device is None:
        return None
    return why_off() or why_not_tried(_op_of(kernel), device)


def why_off() -> str | None:
    """Why no kernel runs that is not asked for by name, or None."""
    return f"off: {_VARIABLE}=0 is set" if SETTING == "0" else None


def why_not_tried(op: str, device: Any) -> str | None:
    """Why the kernels of an op do not run on a Hopper GPU by themselves, or None.

    For a GPU that is not of this machine they are compiled untried.
    """
    if SETTING == "1" or not _is_here(device):
        return None
    return _trial.why_not(op, device)


def _op_of(kernel: Callable[..., Any]) -> str:
    """The folder that it is in."""
    *_, op, _ = kernel.__module__.split(".")
    return op


def _is_here(device: Any) -> bool:
    """Whether a device is one of this program's, not one to compile for."""
    try:
        return any(device is d for d in jax.devices(device.platform))
    except RuntimeError:
        return False


def why_not_on(device: Any) -> str | None:
    """Why no kernel for Hopper runs on a device, or None."""
    if device.platform == "cpu":
        return f"{_NEEDS}; this is a CPU"
    capability = getattr(device, "compute_capability", None)
    if capability is None and _HOPPER_KIND.search(device.device_kind):
        capability = CAPABILITY
    named = f"'s is {capability}" if capability else f" is {device.device_kind!r}"
    return None if capability == CAPABILITY else f"{_NEEDS}; this one{named}"


def _is_partitioned(axis_context: Any) -> bool:
    """Whether the compiler divides arrays among devices; shard_map has done so."""
    if hasattr(axis_context, "manual_axes"):
        return set(axis_context.manual_axes) != set(axis_context.mesh.axis_names)
    return axis_context.num_devices > 1


def _why_not_divided(context: mlir.ModuleContext, divided: Any) -> str | None:
    """Why a kernel cannot be divided among the devices of a program, or None."""
    within = "call it within shard_map over all axes of the mesh"
    axis_context: Any = context.axis_context
    if divided is None:
        return f"mosaic_gpu does not divide this among devices: {within}"
    if hasattr(axis_context, "manual_axes"):
        return f"mosaic_gpu divides nothing within a shard_map: {within}"
    here = len(context.backend.devices()) if context.backend else 0
    if context.lowering_parameters.for_export or here < axis_context.num_devices:
        return f"mosaic_gpu divides nothing in what is exported: {within}"
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return f"mosaic_gpu is divided by the Shardy partitioner: {within}"
    if _partition.mesh_of(axis_context.num_devices) is None:
        return f"mosaic_gpu is divided among 2, 4, 8, ... devices: {within}"
    return None


def _on_halves(ctx: Any) -> Any:
    """With the mesh of `_partition` and its devices.

    JAX tells them to the lowering of no program but of those with primitives of its
    own list. Which devices they are is of no consequence: they stand for their numbers.
    """
    context = ctx.module_context
    count = context.axis_context.num_devices
    axis_context = dataclasses.replace(
        context.axis_context,
        device_assignment=tuple(context.backend.devices()[:count]),
        abstract_mesh=_partition.mesh_of(count),
    )
    return ctx.replace(module_context=context.replace(axis_context=axis_context))


def _batch(arrays, axes, *, broadcast, **params):
    mapped = list(zip(arrays, axes, strict=True))
    size = next(x.shape[axis] for x, axis in mapped if axis is not None)
    leading = [
        jax.numpy.broadcast_to(x, (size if broadcast else 1, *x.shape))
        if axis is None
        else jax.numpy.moveaxis(x, axis, 0)
        for x, axis in mapped
    ]
    outputs = _choose_p.bind(*leading, broadcast=broadcast, **params)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[_choose_p] = _batch
