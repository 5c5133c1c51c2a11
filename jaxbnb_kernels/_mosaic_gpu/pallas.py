"""Pallas for Mosaic GPU as jax 0.10.2 and newer releases spell it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# In jax < 0.11 the index is a separate argument.
_LOAD_HAS_INDEX = "idx" in inspect.signature(plgpu.load).parameters


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads all of ``ref`` into registers of that layout, or of any if it is None."""
    if layout is None:
        return ref[...]
    index = ((),) if _LOAD_HAS_INDEX else ()
    # An optimized load would go through shared memory.
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Sets ``ref[...] = value``, also from threads that write two bytes each."""
    # jax >= 0.11 refuses stores that it considers slow, unless they are declared so.
    if write := getattr(plgpu, "store", None):
        write(ref, value, optimized=False)
    else:
        ref[...] = value


def kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    grid: dict[str, int],
    scratch_types: tuple[Any, ...] = (),
    interpret: bool = False,
) -> Callable[..., Any]:
    """Like ``plgpu.kernel``, for one warpgroup, with inferred layouts.

    The kernel also takes references of `jax.experimental.pallas.run_state`, and reads
    and writes them in place. ``plgpu.kernel`` does so only from jax 0.11 on.

    Args:
        body: function of references to the operands, the results and the scratch.
        out_type: ``jax.ShapeDtypeStruct`` of the results.
        grid: extent of each named axis.
        scratch_types: see ``plgpu.kernel``.
        interpret: run on the CPU, one warpgroup after the other.
    """

    @functools.wraps(body)
    def with_scratch(*refs):
        pl.run_scoped(functools.partial(body, *refs), *scratch_types)

    # Even within a shard_map, results do not vary along any axis, because `_selection`
    # lowers the kernel outside the mesh.
    no_axes = jax.sharding.ManualAxisType()
    return pl.kernel(
        with_scratch,
        out_type=jax.tree.map(
            lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, manual_axis_type=no_axes),
            out_type,
        ),
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
        name=body.__name__,
        compiler_params=plgpu.CompilerParams(
            # Custom layouts need these semantics, the only ones from jax 0.11 on.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter() if interpret else False,
    )


def interpreter(**options: Any) -> Any:
    """Returns the parameters that make Pallas interpret a kernel."""
    # jax < 0.11 has this class but does not export it.
    if params := getattr(plgpu, "InterpretGPUParams", None):
        return params(**options)
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(**options)
