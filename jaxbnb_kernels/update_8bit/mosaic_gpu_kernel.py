"""The whole step in one pass over memory and in place: the kernel for Hopper GPUs.

Where they are donated, or needed no more, the parameter, the codes and the absmax are
overwritten, and nothing else is allocated.

It differs from the other implementations by roundings only. A sum of two products is
rounded once, as XLA may do as well. A square root is off by up to 2^-23 of it and a
quotient by 2^-22, and what is below 2^-126 counts as zero in a root and in a divisor:
`in_registers`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxbnb_kernels import _cells, _tiles, blockwise
from jaxbnb_kernels._mosaic_gpu import inlined, layouts, memory, pallas, tables
from jaxbnb_kernels._mosaic_gpu.instructions import reciprocal
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit.operands import Step, by_name, by_rule

# Elements that a warpgroup steps at a time: 16 a thread.
TILE = 2048
# Tiles that run at a time: on each of 132 multiprocessors of an H100 or H200, as many
# as its registers suffice for.
CONCURRENT_TILES = 4 * 132


def update(
    scalars: Float[Array, "*batch count"], *arrays: Array, step: Step
) -> list[Array]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        scalars: scalars of the rule, in the order of the leaves.
        *arrays: the gradient, the parameter if there is one, the codes of each moment,
            and the absmax of each.
        step: all else.
    """
    grad, param, codes, absmax = by_name(arrays, len(step.signed))
    overwritten = [grad if param is None else param, *codes, *absmax]
    if grad.size == 0:
        return overwritten
    size = step.layout.size
    results = _update_blocks(
        scalars.reshape(-1, scalars.shape[-1]),
        grad.reshape(-1, size),
        None if param is None else param.reshape(-1, size),
        [c.reshape(-1, size) for c in codes],
        [a.reshape(-1) for a in absmax],
        step,
    )
    return [x.reshape(y.shape) for x, y in zip(results, overwritten, strict=True)]


def _update_blocks(
    scalars: Float[Array, "examples count"],
    grad: Float[Array, "blocks size"],
    param: Float[Array, "blocks size"] | None,
    codes: list[Array],
    absmax: list[Array],
    step: Step,
) -> list[Array]:
    """``[result, *codes, *absmax]``; each example has the same number of the blocks."""
    dtype = (grad if param is None else param).dtype
    examples, size = scalars.shape[0], grad.shape[1]
    num_blocks = grad.shape[0] // examples
    rows, vector_size = tile_of(size, grad.dtype, dtype)
    tiles = math.ceil(num_blocks / rows)
    layout = layouts.rows_layout(size, vector_size)
    of_rows = layout.reduce((1,))
    rule = step.rule.apply if param is None else step.rule.apply_to
    rule = inlined.in_registers(rule, layout)
    invert = functools.partial(reciprocal, layout=of_rows)
    maps = sorted(set(step.signed))
    all_tables = [table for signed in maps for table in tables_of(signed)]

    def update_8bit(*refs):
        # Tables, scalars, the gradient, what is overwritten, an update, the scratch.
        table_refs, (scalars_ref, grad_ref, *overwritten), shared = (
            refs[: len(all_tables)],
            refs[len(all_tables) : -len(all_tables)],
            refs[-len(all_tables) :],
        )
        result_ref = overwritten.pop(-1 if param is None else 0)
        codes_refs, absmax_refs = overwritten[: len(codes)], overwritten[len(codes) :]
        memory.copy_tables(table_refs, shared)
        pairs = zip(shared[::2], shared[1::2], strict=True)
        tables_of_map = dict(zip(maps, pairs, strict=True))

        @plgpu.nd_loop((examples, tiles), collective_axes="tile")
        def _(loop):
            example, tile = loop.index
            exist = num_blocks - tile * rows
            at = pl.ds(example * num_blocks + tile * rows, rows)

            def load(ref, layout=layout):
                return memory.load_rows(ref.at[at], exist, layout)

            def store(ref, values, layout=layout):
                memory.store_rows(ref.at[at], values, exist, layout)

            g = load(grad_ref).astype(jnp.float32)
            p = [] if param is None else [load(result_ref).astype(jnp.float32)]
            held = [load(ref) for ref in codes_refs]
            of_block = [load(ref, of_rows) for ref in absmax_refs]
            s = by_rule(scalars_ref, step, example)
            old = tuple(
                tables.look_up(c, tables_of_map[signed][0], layout)
                * jax.lax.broadcast_in_dim(a, c.shape, (0,))
                for c, a, signed in zip(held, of_block, step.signed, strict=True)
            )
            result, kept = rule(s, g, old, *p)
            store(result_ref, result.astype(dtype))
            for values, signed, codes_ref, absmax_ref in zip(
                kept, step.signed, codes_refs, absmax_refs, strict=True
            ):
                a = jnp.max(jnp.abs(values), axis=1)
                store(absmax_ref, a, of_rows)
                for factor in blockwise.factors(a, invert):
                    values *= jax.lax.broadcast_in_dim(factor, values.shape, (0,))
                cells, _ = cells_of(signed)
                cells_ref = tables_of_map[signed][1]
                c = tables.encode(values, cells_ref, cells, 8, layout)
                store(codes_ref, c)

    call = pallas.kernel(
        update_8bit,
        out_type=jax.ShapeDtypeStruct(grad.shape, dtype) if param is None else (),
        # Each copies the tables, so only as many start as run at once.
        grid={"tile": min(examples * tiles, CONCURRENT_TILES)},
        scratch_types=tuple(plgpu.SMEM(t.shape, t.dtype) for t in all_tables),
    )

    def overwrite(refs):
        operands = [*map(jnp.asarray, all_tables), scalars, grad]
        if param is None:
            # A new array, since the gradient may be needed again.
            refs[0][...] = call(*operands, *refs[1:])
        else:
            call(*operands, *refs)

    result = jnp.zeros(grad.shape, dtype) if param is None else param
    return pl.run_state(overwrite)([result, *codes, *absmax])


def tile_of(block_size: int, *dtypes: Any) -> tuple[int, int]:
    """How many blocks a warpgroup steps at a time, and neighbours a thread holds."""
    vector_size = _tiles.WIDEST_ACCESS // max(
        np.dtype(dtype).itemsize for dtype in dtypes
    )
    least = _tiles.tile_rows(block_size, vector_size)
    return max(least, TILE // block_size), vector_size


def cells_of(signed: bool) -> tuple[_cells.Cells, np.ndarray]:
    """How a moment is encoded: a positive one of the unsigned map never as zero."""
    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return _cells.of_codebook(levels.tobytes(), keep_positive=not signed)


def tables_of(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a warpgroup decodes a moment with, and what it encodes it with."""
    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return tables.shared_table(levels), tables.shared_table(cells_of(signed)[1])
