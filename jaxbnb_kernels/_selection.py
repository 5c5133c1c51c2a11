"""Which implementation of an op runs.

`run` takes the one that is asked for, or the first that can serve the call. Whether a
kernel is among them shows only when a program is lowered, since the device is unknown
before. So `choose` binds a primitive that carries the names of the kernels, for GPUs
and for CPUs, and the portable function. Its lowering asks why each kernel does not run
there, and lowers the first that does. For GPUs `why_not` decides, a pure function.

A program that is exported for an absent machine is for the device that JAX's context
names, `jax.sharding.AbstractDevice`.
"""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxbnb_kernels import _partition, _records, native
from jaxbnb_kernels._architecture import ARCHITECTURES, describe, gpus_of
from jaxbnb_kernels._config import MosaicGpu, config
from jaxbnb_kernels._cpu import build

logger = logging.getLogger("jaxbnb")

# Ops whose kernels need an instruction of certain GPUs; those of all others do not.
_ONLY: Final = {"matmul_int8": ("9.0",)}
_FIRST, _SECOND, *_, _LAST = ARCHITECTURES
_NEEDS: Final = "mosaic_gpu needs compute capability"
_NEEDS_ANY: Final = f"{_NEEDS} {_FIRST}, {_SECOND}, ... {_LAST}"
# Kinds of kernels, and the platform that each is for.
PLATFORMS: Final = {"mosaic_gpu": "cuda", "cpu": "cpu"}


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
) -> Any:
    """Calls one implementation of ``op``.

    An implementation that cannot serve these arguments raises ``NotImplementedError``
    and the next one is tried. One that is asked for by name is the only one tried.
    By default, kernels of all kinds come first: on a device without a kernel they
    compute the result in another way.

    Args:
        op: the op's name, for messages.
        implementations: name -> function, the preferred one first. Those of
            ``PLATFORMS`` have the same function, which takes ``kinds`` and
            ``is_required`` too.
        implementation: a name, or None for the first that can.
        *args: the op's arguments.

    Raises:
        ValueError: unknown name of an implementation.
        NotImplementedError: the implementation asked for cannot serve the arguments.
        ExceptionGroup: none can; it holds each one's reason.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op} has no implementation {implementation!r}; "
                f"choose one of {sorted(implementations)}, or None"
            )
        function = implementations[implementation]
        if implementation in PLATFORMS:
            return function(*args, kinds=(implementation,), is_required=True)
        return function(*args)
    kinds = [name for name in PLATFORMS if name in implementations]
    kinds = tuple(name for name in kinds if getattr(config, name) != "never")
    candidates = [f for name, f in implementations.items() if name not in PLATFORMS]
    if kinds:
        function = implementations[kinds[0]]
        kernels = functools.partial(function, kinds=kinds, is_required=False)
        candidates.insert(0, kernels)
    errors = []
    for candidate in candidates:
        try:
            return candidate(*args)
        except NotImplementedError as error:
            errors.append(error)
    raise ExceptionGroup(f"no implementation of {op} can serve this call", errors)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel by its name, so that Pallas is imported only when one is lowered.

    Attributes:
        op: the op's folder.
        function: name of the function that calls the kernel, the same in each module.
        module: the module in that folder. It serves every GPU that the op has kernels
            for, see `capabilities`.
        kind: a name of ``PLATFORMS``.
    """

    op: str
    function: str
    module: str = "mosaic_gpu_kernel"
    kind: str = "mosaic_gpu"

    @classmethod
    def for_cpu(cls, op: str, function: str) -> "Kernel":
        """A native kernel, whatever the CPU is: the library chooses instructions."""
        return cls(op, function, "cpu_kernel", "cpu")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities of GPUs that it is written for."""
        return _ONLY.get(self.op, tuple(ARCHITECTURES))

    def load(self) -> Callable[..., Sequence[jax.Array]]:
        """Imports the kernel."""
        module = importlib.import_module(f"jaxbnb_kernels.{self.op}.{self.module}")
        return getattr(module, self.function)


def serving(
    kinds: Sequence[str], **of_kind: Callable[[], Kernel]
) -> tuple[Kernel, ...]:
    """Returns the kernels that serve a call, in the order of ``kinds``.

    Args:
        kinds: names of ``PLATFORMS`` that are wanted.
        **of_kind: a function for each kind. It returns the kernel, or raises
            ``NotImplementedError`` if the kernel does not support the call.

    Raises:
        NotImplementedError: no kernel serves the call; the reason of the first one.
    """
    kernels, errors = [], []
    for kind in kinds:
        try:
            kernels.append(of_kind[kind]())
        except NotImplementedError as error:
            errors.append(error)
    if not kernels:
        raise errors[0]
    return tuple(kernels)


def choose(
    kernels: tuple[Kernel, ...],
    portable: Callable[..., Sequence[jax.Array]],
    *arrays: jax.Array,
    is_required: bool,
    should_broadcast: bool = True,
    divided: Callable[..., Sequence[jax.Array]] | None = None,
    whole: Callable[..., Sequence[jax.Array]] | None = None,
    **static: Any,
) -> list[jax.Array]:
    """Calls a kernel on devices that it runs on, and ``portable`` elsewhere.

    Args:
        kernels: kernels of different kinds; only one if it is required, and none for
            ``portable`` itself. A kernel takes arrays with the same leading axes, as
            does ``portable``.
        portable: returns arrays of the same shapes and dtypes as the kernels.
        *arrays: arrays for both.
        is_required: whether to raise, instead of calling ``portable``, where the kernel
            cannot run.
        should_broadcast: whether a mapped call repeats the arrays that are not mapped.
            Otherwise the functions take those with axes of one.
        divided: ``divided(kernel, *arrays, **static)`` calls `_partition.divide`, for
            arrays that the compiler divides among devices; None if it cannot.
        whole: the same as ``portable``, for arrays that the compiler divides; None for
            ``portable`` itself.
        **static: hashable keyword arguments for all of them.

    Raises:
        NotImplementedError: the kernel is required, and the program is lowered for
            another device, or for several that the call cannot be divided among; or
            the arrays are sharded explicitly.
    """
    if any(axis is not None for x in arrays for axis in jax.typeof(x).sharding.spec):
        raise NotImplementedError("kernels divide no arrays: call it within shard_map")
    return _choose_p.bind(
        *arrays,
        kernels=kernels,
        portable=portable,
        divided=divided,
        whole=whole,
        option="always" if is_required else config.mosaic_gpu,
        is_required=is_required,
        should_broadcast=should_broadcast,
        static=tuple(static.items()),
    )


def why_not(
    kernel: Kernel,
    gpus: Iterable[_records.Gpu],
    option: MosaicGpu,
    records: Sequence[_records.Record],
) -> str | None:
    """Why a kernel does not run on these GPUs, or None: a pure function.

    Args:
        kernel: the kernel.
        gpus: the GPUs that a program may run on, at least one.
        option: `jaxbnb_kernels.config.mosaic_gpu`; "always" for a required kernel.
        records: outcomes of checks, the ones that count most last.
    """
    if option == "never":
        return "off: jaxbnb_kernels.config.mosaic_gpu is 'never'"
    gpus = list(gpus)
    if len({gpu.capability for gpu in gpus}) > 1:
        kinds = ", ".join(sorted({gpu.kind for gpu in gpus}))
        return f"mosaic_gpu needs GPUs of one compute capability; here are {kinds}"
    for gpu in gpus:
        if reason := _why_not_compiled(kernel, gpu):
            return reason
        if option == "always":
            continue
        record = _records.find(records, kernel.op, gpu)
        if record is None:
            return f"not verified on {gpu.kind}: run `jaxbnb verify-kernels`"
        if record.reason is not None:
            return f"its checks failed on {gpu.kind}: {record.reason}"
    return None


def _why_not_compiled(kernel: Kernel, gpu: _records.Gpu) -> str | None:
    """Why a kernel cannot be compiled for a GPU, or None."""
    if gpu.capability not in kernel.capabilities:
        named = f"'s is {gpu.capability}" if gpu.capability else f" is {gpu.kind!r}"
        only = _ONLY.get(kernel.op)
        needs = f"{_NEEDS} {' or '.join(only)}" if only else _NEEDS_ANY
        return f"{needs}; this one{named}"
    oldest = ARCHITECTURES[gpu.capability].jax
    if jax.__version_info__ < oldest:
        return (
            f"mosaic_gpu needs jax {'.'.join(map(str, oldest))} or newer for a GPU of "
            f"compute capability {gpu.capability}; this is jax {jax.__version__}"
        )
    if gpu.driver is not None:
        supported, built_with = gpu.driver
        # Within a major version, a driver runs what newer compilers assemble.
        if supported // 1000 < built_with // 1000:
            return (
                f"mosaic_gpu assembles kernels with CUDA {_dotted(built_with)}; this "
                f"driver supports CUDA up to {_dotted(supported)}: update it"
            )
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def records() -> tuple[_records.Record, ...]:
    """The records that count in this process, the user's own last."""
    if jax.process_count() > 1:
        # All processes must compile the same program, and each host has other files.
        return _records.shipped()
    return _records.shipped() + _records.of_user()


def why_not_on(device: Any) -> str | None:
    """Why no kernel at all runs on a device, or None."""
    gpu = describe(device)
    if gpu is None:
        return f"{_NEEDS_ANY}; this is a CPU"
    return why_not(Kernel("", ""), [gpu], "always", ())


_choose_p = Primitive("choose_implementation")
_choose_p.multiple_results = True
_compiled = jax.jit(
    _choose_p.bind,
    static_argnames=(
        "kernels",
        "portable",
        "divided",
        "whole",
        "option",
        "is_required",
        "should_broadcast",
        "static",
    ),
)


@_choose_p.def_impl
def _run_by_itself(*arrays, **params):
    # The choice is made by lowering, so this is compiled even under jax.disable_jit.
    with jax.disable_jit(False):
        return _compiled(*arrays, **params)


@_choose_p.def_abstract_eval
def _shapes(*arrays, portable, static, **_):
    # These include the axes of shard_map along which arrays vary.
    traced = jax.make_jaxpr(functools.partial(portable, **dict(static)))(*arrays)
    return traced.out_avals


def _lower(
    ctx,
    *arrays,
    kernels,
    portable,
    divided,
    whole,
    option,
    is_required,
    static,
    **_,
):
    context = ctx.module_context
    is_partitioned = _is_partitioned(context.axis_context)
    function, reason = None, "there is no kernel"
    for kernel in kernels:
        function, reason = _find(kernel, context, option, is_required)
        if function is not None and is_partitioned:
            reason = _why_not_divided(kernel, context, divided)
        if reason is None:
            break
    if reason and is_required:
        raise NotImplementedError(reason)
    if reason:
        functions = (whole if whole and is_partitioned else portable,)
    else:
        functions = (divided, function) if is_partitioned else (function,)
    call = functools.partial(_call, functions=functions, static=static)
    if not reason and not is_partitioned:
        # The kernel does not care that arrays vary along axes of a shard_map.
        return _partition.lower_alone(ctx, call, *arrays)
    if not reason:
        ctx = _on_halves(ctx)
    return mlir.lower_fun(call, multiple_results=True)(ctx, *arrays)


def _find(
    kernel: Kernel, context: mlir.ModuleContext, option: MosaicGpu, is_required: bool
) -> tuple[Callable[..., Sequence[jax.Array]] | None, str | None]:
    """The function that calls a kernel, or None and why it does not run."""
    if kernel.kind == "cpu":
        reason = _why_not_native(context)
        if reason is None:
            return kernel.load(), None
        if reason == native.why_not() and build.is_for_this_machine():
            _say_once("CPU", reason)
        return None, reason
    gpus, reason = _targets(context, is_required)
    if reason is None:
        known = records() if option == "verified" else ()
        reason = why_not(kernel, gpus, option, known)
        if reason is not None and why_not(kernel, gpus, "always", ()) is None:
            if jax.process_count() > 1:
                reason += (
                    ". In several processes your own records do not count: set "
                    'jaxbnb_kernels.config.mosaic_gpu = "always" in each of them'
                )
            _say_once("GPU", reason)
    if reason is not None:
        return None, reason
    return kernel.load(), None


def _why_not_native(context: mlir.ModuleContext) -> str | None:
    """Why a native kernel does not run where a program is lowered for, or None."""
    if tuple(context.platforms) != ("cpu",):
        return f"cpu needs a CPU; this is lowered for {', '.join(context.platforms)}"
    if context.lowering_parameters.for_export:
        # Whoever loads the program may not have the library.
        return "cpu is not exported: native kernels are part of this process"
    return native.why_not()


# Jitted, so that arrays of the same shapes are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("functions", "static"))
def _call(*arrays, functions, static):
    first, *others = functions
    return first(*others, *arrays, **dict(static))


mlir.register_lowering(_choose_p, _lower)


def _targets(
    context: mlir.ModuleContext, is_required: bool
) -> tuple[list[_records.Gpu], str | None]:
    """The GPUs that a program may run on, and why no kernel runs on them, or None.

    A required kernel is lowered for an unnamed GPU too: its machine code does not run
    on any other.
    """
    if tuple(context.platforms) != ("cuda",):
        return [], f"{_NEEDS_ANY}; this is lowered for {', '.join(context.platforms)}"
    gpus = gpus_of(context)
    if not gpus and not is_required:
        return [], f"{_NEEDS_ANY}; this one's is unknown"
    return gpus, None


@functools.cache
def _say_once(device: str, reason: str) -> None:
    """Logs why kernels do not run: one line a process for each reason."""
    logger.warning(
        "jaxbnb runs XLA's code instead of its own %s kernels: %s", device, reason
    )


def _is_partitioned(axis_context: Any) -> bool:
    """Whether the compiler divides arrays among devices; shard_map has done so."""
    if hasattr(axis_context, "manual_axes"):
        return set(axis_context.manual_axes) != set(axis_context.mesh.axis_names)
    return axis_context.num_devices > 1


def _why_not_divided(
    kernel: Kernel, context: mlir.ModuleContext, divided: Any
) -> str | None:
    """Why a kernel cannot be divided among the devices of a program, or None."""
    kind = kernel.kind
    within = "call it within shard_map over all axes of the mesh"
    axis_context: Any = context.axis_context
    if divided is None:
        return f"{kind} does not divide this among devices: {within}"
    if hasattr(axis_context, "manual_axes"):
        return f"{kind} divides nothing within a shard_map: {within}"
    here = len(context.backend.devices()) if context.backend else 0
    if context.lowering_parameters.for_export or here < axis_context.num_devices:
        return f"{kind} divides nothing in what is exported: {within}"
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return f"{kind} is divided by the Shardy partitioner: {within}"
    if _partition.mesh_of(axis_context.num_devices) is None:
        return f"{kind} is divided among 2, 4, 8, ... devices: {within}"
    return None


def _on_halves(ctx: Any) -> Any:
    """Adds the mesh of `_partition` and its devices to a lowering's context.

    JAX tells them only to programs with primitives of its own list. Which devices they
    are does not matter: they stand for their numbers.
    """
    context = ctx.module_context
    count = context.axis_context.num_devices
    axis_context = dataclasses.replace(
        context.axis_context,
        device_assignment=tuple(context.backend.devices()[:count]),
        abstract_mesh=_partition.mesh_of(count),
    )
    return ctx.replace(module_context=context.replace(axis_context=axis_context))


def _batch(arrays, axes, *, should_broadcast, **params):
    mapped = list(zip(arrays, axes, strict=True))
    size = next(x.shape[axis] for x, axis in mapped if axis is not None)
    leading = [
        jax.numpy.broadcast_to(x, (size if should_broadcast else 1, *x.shape))
        if axis is None
        else jax.numpy.moveaxis(x, axis, 0)
        for x, axis in mapped
    ]
    outputs = _choose_p.bind(*leading, should_broadcast=should_broadcast, **params)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[_choose_p] = _batch
