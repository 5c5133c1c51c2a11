"""The whole step in one pass over memory and in place, for Hopper GPUs.

Where they are donated, or needed no more, the parameter, the codes and the absmax are
overwritten, and nothing else is allocated.

It differs from the other implementations by roundings only. A sum of two products is
rounded once, as XLA may do as well. A square root is off by up to 2^-23 of it and a
quotient by 2^-22, and what is below 2^-126 counts as zero in a root and in a divisor:
`in_registers`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels import _blocks, _cells, _hopper, _partition
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit import xla
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment
from jaxbnb_kernels.update_8bit.rule import Rule

# Of longer blocks, a warpgroup's registers do not hold enough at a time.
BLOCK_SIZES = tuple(2**i for i in range(5, 11))
# What a warpgroup steps at a time: 16 elements a thread.
TILE = 2048
# Bytes that a thread reads or writes at once.
WIDEST_ACCESS = 16
# On each multiprocessor of an H100 or H200 as many as its registers suffice for.
CONCURRENT_TILES = 4 * 132
# What a rule may be made of: operations that Mosaic GPU has, and `in_registers`.
OPERATIONS = {"abs", "add", "div", "max", "min", "mul", "neg", "rsqrt", "sign", "sqrt"}
OPERATIONS |= {"square", "sub", "and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne"}
OPERATIONS |= {"or", "select_n", "broadcast_in_dim", "convert_element_type"}
OPERATIONS |= {"jit", "pjit"}


@dataclasses.dataclass(frozen=True)
class Step:
    """What does not depend on values, and is hashable.

    Attributes:
        rule: what happens to an element.
        scalars: the structure of those that the rule takes.
        signed: of each moment, of which map its codes are.
        layout: of the blocks.
    """

    rule: Rule
    scalars: Any
    signed: tuple[bool, ...]
    layout: BlockLayout


def update(
    rule,
    scalars,
    grad: Float[Array, "*shape"],
    moments,
    layout: BlockLayout,
    param,
    *,
    required: bool = True,
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """See `update_8bit`; raises where no kernel can serve the call."""
    leaves, structure = jax.tree.flatten(scalars)
    leaves = [jnp.asarray(x) for x in leaves]
    step = Step(rule, structure, tuple(m.signed for m in moments), layout)
    _check(step, leaves, grad, param)
    # No kernel reads an empty operand.
    packed = jnp.stack(leaves) if leaves else jnp.zeros(1)
    params = () if param is None else (param,)
    codes, absmax = [m.codes for m in moments], [m.absmax for m in moments]
    result, *state = _update((packed, grad, *params, *codes, *absmax), step, required)
    codes, absmax = state[: len(moments)], state[len(moments) :]
    return result, tuple(map(Moment, codes, absmax, step.signed))


def _check(step: Step, scalars: list[jax.Array], grad, param) -> None:
    """Raises where no kernel can serve the call."""
    size, inner = step.layout.size, grad.shape[step.layout.axis :]
    if size not in BLOCK_SIZES:
        raise NotImplementedError(
            f"mosaic_gpu has blocks of {BLOCK_SIZES} elements here; got {size}"
        )
    if math.prod(inner) % size:
        raise NotImplementedError(
            f"mosaic_gpu has whole blocks; {inner} ends with a part of one of {size}"
        )
    for x in (grad,) if param is None else (grad, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"mosaic_gpu has no {x.dtype}")
    for x in scalars:
        if (x.shape, x.dtype) != ((), jnp.float32):
            raise NotImplementedError(
                f"mosaic_gpu has float32 scalars; got {x.dtype} of shape {x.shape}"
            )
    if unknown := _operations(step, param is not None) - OPERATIONS:
        raise NotImplementedError(
            f"mosaic_gpu has no {', '.join(sorted(unknown))}, which the rule needs"
        )


@functools.lru_cache(256)
def _operations(step: Step, has_param: bool) -> set[str]:
    """What the rule is made of."""
    from jaxbnb_kernels import _inlined

    scalar, value = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (1,)))
    scalars = step.scalars.unflatten([scalar] * step.scalars.num_leaves)
    args = [scalars, value, (value,) * len(step.signed), *([value] * has_param)]
    fn = step.rule.apply_to if has_param else step.rule.apply
    return _inlined.operations(jax.make_jaxpr(fn)(*args))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _update(arrays, step: Step, required: bool):
    return _hopper.run(
        update_kernel,
        _update_portable,
        *arrays,
        required=required,
        divided=_update_divided,
        step=step,
    )


@_update.defjvp
def _update_jvp(step, required, primals, tangents):
    def portable(arrays):
        return _update_portable(*arrays, step=step)

    # By xla, whose operations jax can transpose; what it computes again is dropped.
    _, change = jax.jvp(portable, primals, tangents)
    return _update(*primals, step, required), change


def _update_portable(scalars, *arrays, step: Step):
    portable = functools.partial(_update_portable, step=step)
    if scalars.ndim > 1:
        return jax.vmap(portable)(scalars, *arrays)
    grad, param, codes, absmax = _by_name(arrays, len(step.signed))
    result, moments = xla.update(
        step.rule,
        _by_rule(scalars, step),
        grad,
        tuple(map(Moment, codes, absmax, step.signed)),
        step.layout,
        param,
    )
    return [result, *(m.codes for m in moments), *(m.absmax for m in moments)]


def _by_name(arrays, num_moments: int):
    """``(grad, param or None, codes, absmax)`` of operands in this order."""
    split = len(arrays) - 2 * num_moments
    grad, *param = arrays[:split]
    state = arrays[split:]
    return grad, *(param or [None]), state[:num_moments], state[num_moments:]


def _by_rule(scalars: Any, step: Step, *example: Any) -> Any:
    """Packed scalars, those of one example, as the rule takes them."""
    count = step.scalars.num_leaves
    return step.scalars.unflatten([scalars[*example, i] for i in range(count)])


def _update_divided(scalars, *arrays, step: Step):
    examples = scalars.ndim - 1
    # Up to the axis of blocks, of which each spans those after it.
    outer = examples + step.layout.axis + 1
    inner = arrays[0].ndim - outer
    names = *_partition.leading(outer), *[None] * inner
    of_scalars = *_partition.leading(examples), None
    axes = _partition.Axes(
        (of_scalars, *[names] * len(arrays)), (names,) * (1 + 2 * len(step.signed))
    )

    def kernel(scalars, *arrays):
        *_, absmax = arrays
        layout = dataclasses.replace(step.layout, absmax_shape=absmax.shape[examples:])
        part = dataclasses.replace(step, layout=layout)
        return update_kernel(scalars, *arrays, step=part)

    return _partition.divide(kernel, axes, scalars, *arrays)


def update_kernel(
    scalars: Float[Array, "*batch count"], *arrays: Array, step: Step
) -> list[Array]:
    """The kernel itself, for who has checked that it can run.

    Args:
        scalars: of the rule, in the order of the leaves.
        *arrays: the gradient, the parameter if there is one, the codes of each moment,
            and the absmax of each.
        step: all else.
    """
    grad, param, codes, absmax = _by_name(arrays, len(step.signed))
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
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxbnb_kernels import _inlined, _memory, _pallas, _registers

    dtype = (grad if param is None else param).dtype
    examples, size = scalars.shape[0], grad.shape[1]
    num_blocks = grad.shape[0] // examples
    rows, vector_size = tile_of(size, grad.dtype, dtype)
    tiles = math.ceil(num_blocks / rows)
    layout = _registers.rows_layout(size, vector_size)
    of_rows = layout.reduce((1,))
    rule = step.rule.apply if param is None else step.rule.apply_to
    rule = _inlined.in_registers(rule, layout)
    reciprocal = functools.partial(_registers.reciprocal, layout=of_rows)
    maps = sorted(set(step.signed))
    tables = [table for signed in maps for table in tables_of(signed)]

    def update_8bit(*refs):
        # Tables, scalars, the gradient, what is overwritten, an update, the scratch.
        table_refs, (scalars_ref, grad_ref, *overwritten), shared = (
            refs[: len(tables)],
            refs[len(tables) : -len(tables)],
            refs[-len(tables) :],
        )
        result_ref = overwritten.pop(-1 if param is None else 0)
        codes_refs, absmax_refs = overwritten[: len(codes)], overwritten[len(codes) :]
        _memory.copy_tables(table_refs, shared)
        pairs = zip(shared[::2], shared[1::2], strict=True)
        tables_of_map = dict(zip(maps, pairs, strict=True))

        @plgpu.nd_loop((examples, tiles), collective_axes="tile")
        def _(loop):
            example, tile = loop.index
            exist = num_blocks - tile * rows
            at = pl.ds(example * num_blocks + tile * rows, rows)

            def load(ref, layout=layout):
                return _memory.load_rows(ref.at[at], exist, layout)

            def store(ref, values, layout=layout):
                _memory.store_rows(ref.at[at], values, exist, layout)

            g = load(grad_ref).astype(jnp.float32)
            p = [] if param is None else [load(result_ref).astype(jnp.float32)]
            held = [load(ref) for ref in codes_refs]
            of_block = [load(ref, of_rows) for ref in absmax_refs]
            s = _by_rule(scalars_ref, step, example)
            old = tuple(
                _registers.look_up(c, tables_of_map[signed][0], layout)
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
                for factor in _blocks.factors(a, reciprocal):
                    values *= jax.lax.broadcast_in_dim(factor, values.shape, (0,))
                cells, _ = cells_of(signed)
                cells_ref = tables_of_map[signed][1]
                c = _registers.encode(values, cells_ref, cells, 8, layout)
                store(codes_ref, c)

    call = _pallas.kernel(
        update_8bit,
        out_type=jax.ShapeDtypeStruct(grad.shape, dtype) if param is None else (),
        # Each copies the tables, so there are no more than run at once.
        grid={"tile": min(examples * tiles, CONCURRENT_TILES)},
        scratch_types=tuple(plgpu.SMEM(t.shape, t.dtype) for t in tables),
    )

    def overwrite(refs):
        operands = [*map(jnp.asarray, tables), scalars, grad]
        if param is None:
            # A new array, since the gradient may be needed again.
            refs[0][...] = call(*operands, *refs[1:])
        else:
            call(*operands, *refs)

    result = jnp.zeros(grad.shape, dtype) if param is None else param
    return pl.run_state(overwrite)([result, *codes, *absmax])


def tile_of(block_size: int, *dtypes: Any) -> tuple[int, int]:
    """How many blocks a warpgroup steps at a time, and neighbours a thread holds."""
    from jaxbnb_kernels import _registers

    vector_size = WIDEST_ACCESS // max(np.dtype(dtype).itemsize for dtype in dtypes)
    least = _registers.tile_rows(block_size, vector_size)
    return max(least, TILE // block_size), vector_size


def cells_of(signed: bool) -> tuple[_cells.Cells, np.ndarray]:
    """How a moment is encoded: a positive one of the unsigned map never as zero."""
    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return _cells.of_codebook(levels.tobytes(), keep_positive=not signed)


def tables_of(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a warpgroup decodes a moment with, and what it encodes it with."""
    from jaxbnb_kernels import _registers

    levels = DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
    return _registers.shared_table(levels), _registers.shared_table(cells_of(signed)[1])
