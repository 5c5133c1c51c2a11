"""Pallas for Mosaic GPU as jax 0.10.2 and newer releases spell it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# jax < 0.11 has the index as an argument of its own.
_LOAD_HAS_INDEX = "idx" in inspect.signature(plgpu.load).parameters


def load(ref: Any, layout: Any) -> jax.Array:
    """All of ``ref`` in registers of that layout, or of any if it is None."""
    if layout is None:
        return ref[...]
    index = ((),) if _LOAD_HAS_INDEX else ()
    # Optimized would mean through shared memory.
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """``ref[...] = value``, also from threads that write two bytes each."""
    # jax >= 0.11 refuses stores that it finds slow, unless told that they are meant.
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
    """``plgpu.kernel`` of one warpgroup, in the semantics that infer layouts.

    It also takes references of `jax.experimental.pallas.run_state`, and reads and
    writes them in place. ``plgpu.kernel`` does so only from jax 0.11 on.

    Args:
        body: takes references to the operands, to the results and to the scratch.
        out_type: the results, as ``jax.ShapeDtypeStruct``.
        grid: the extent of each named axis.
        scratch_types: see ``plgpu.kernel``.
        interpret: run on the CPU, one warpgroup after the other.
    """

    @functools.wraps(body)
    def with_scratch(*refs):
        pl.run_scoped(functools.partial(body, *refs), *scratch_types)

    # Within a shard_map too, results vary along no axis: `_selection` lowers it alone.
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
            # The only ones from jax 0.11 on, and what custom layouts need.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpreter() if interpret else False,
    )


def interpreter(**options: Any) -> Any:
    """How a kernel is interpreted."""
    # jax < 0.11 has it, and does not export it.
    if params := getattr(plgpu, "InterpretGPUParams", None):
        return params(**options)
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(**options)
