"""The whole step in one pass over memory and in place: the kernel for GPUs.

The kernel overwrites the parameter, the codes and the absmax if they are donated or no
longer needed. Nothing else is allocated then.

It differs from the other implementations only by roundings. A sum of two products is
rounded once, as XLA may do as well. The relative error of a square root is up to 2^-23,
and that of a quotient 2^-22. Numbers below 2^-126 count as zero in a root or a divisor:
see `in_registers`.
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
from jaxbnb_kernels._architecture import target
from jaxbnb_kernels._mosaic_gpu import inlined, layouts, memory, pallas, tables
from jaxbnb_kernels._mosaic_gpu.instructions import reciprocal, row_absmax
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit.operands import Step, by_name, by_rule

# Elements that a warpgroup updates at a time: 16 a thread.
TILE = 2048
# Tiles that run at a time: as many as the registers of a multiprocessor suffice for, on
# each of the 132 of an H100 or H200.
CONCURRENT_TILES = 4 * 132


def update(
    scalars: Float[Array, "*batch count"], *arrays: Array, step: Step
) -> list[Array]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        scalars: scalars of the rule, in the order of the leaves.
        *arrays: gradient, parameter if there is one, codes of each moment, and absmax
            of each moment.
        step: static description of the step.
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
    """Returns ``[result, *codes, *absmax]``; all examples have as many blocks."""
    dtype = (grad if param is None else param).dtype
    examples, size = scalars.shape[0], grad.shape[1]
    # A mapped call has more than the one that was checked.
    num_blocks = _tiles.numbered(grad.shape[0]) // examples
    rows, vector_size = tile_of(size, grad.dtype, dtype)
    tiles = math.ceil(num_blocks / rows)
    layout = layouts.rows_layout(size, vector_size)
    absmax_layout = layout.reduce((1,))
    rule = step.rule.apply if param is None else step.rule.apply_to
    rule = inlined.in_registers(rule, layout)
    invert = functools.partial(reciprocal, layout=absmax_layout)
    maps = sorted(set(step.signed))
    all_tables = [table for signed in maps for table in tables_of(signed)]
    shared_bytes = sum(table.nbytes for table in all_tables)

    def update_8bit(*refs):
        # Tables, scalars, gradient, overwritten arrays, an update, scratch.
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
            block_absmax = [load(ref, absmax_layout) for ref in absmax_refs]
            s = by_rule(scalars_ref, step, example)
            old = tuple(
                tables.look_up(c, tables_of_map[signed][0], layout)
                * jax.lax.broadcast_in_dim(a, c.shape, (0,))
                for c, a, signed in zip(held, block_absmax, step.signed, strict=True)
            )
            result, kept = rule(s, g, old, *p)
            store(result_ref, result.astype(dtype))
            for values, signed, codes_ref, absmax_ref in zip(
                kept, step.signed, codes_refs, absmax_refs, strict=True
            ):
                a = row_absmax(values)
                store(absmax_ref, a, absmax_layout)
                for factor in blockwise.factors(a, invert):
                    values *= jax.lax.broadcast_in_dim(factor, values.shape, (0,))
                cells, _ = cells_of(signed)
                cells_ref = tables_of_map[signed][1]
                c = tables.encode(values, cells_ref, cells, 8, layout)
                store(codes_ref, c)

    call = pallas.kernel(
        update_8bit,
        out_type=jax.ShapeDtypeStruct(grad.shape, dtype) if param is None else (),
        # Each warpgroup copies the tables, so only as many start as run at once.
        grid={
            "tile": min(
                examples * tiles, target().at_once(CONCURRENT_TILES, shared_bytes)
            )
        },
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
    """Returns the blocks in a tile, and the adjacent elements that a thread holds."""
    vector_size = _tiles.WIDEST_ACCESS // max(
        np.dtype(dtype).itemsize for dtype in dtypes
    )
    least = _tiles.tile_rows(block_size, vector_size)
    return max(least, TILE // block_size), vector_size


def cells_of(signed: bool) -> tuple[_cells.Cells, np.ndarray]:
    """Returns the cells and the table that encode a moment.

    In the unsigned map, a positive element is never encoded as zero.
    """
    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return _cells.of_codebook(levels.tobytes(), keep_positive=not signed)


def tables_of(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables that a warpgroup decodes and encodes a moment with."""
    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return tables.shared_table(levels), tables.shared_table(cells_of(signed)[1])
