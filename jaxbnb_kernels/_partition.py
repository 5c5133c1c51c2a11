"""Kernels on arrays that XLA divides among devices: each device computes its part.

XLA's partitioner cannot look into a kernel. So this module names the axes that may be
divided. Axes with the same name are divided alike, wherever they occur.
"""

import functools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxbnb_kernels._architecture import lowered_for

# The name of each axis; None for an axis that every device needs in full.
Names = tuple[str | None, ...]
# For each name, the mesh axes it is divided along.
Division = dict[str | None, tuple[str, ...]]


class Axes(NamedTuple):
    """The names of the axes of a function's operands and results.

    Axes with the same name have sizes that are multiples of the smallest one. A name
    that occurs only in operands is contracted: each device computes a partial sum.
    """

    operands: tuple[Names, ...]
    results: tuple[Names, ...]


def leading(count: int) -> Names:
    """Returns names for ``count`` leading axes."""
    return tuple(f"leading{i}" for i in range(count))


def of_matrices(operands: Sequence[tuple[int, ...]], names: Sequence[Names]) -> Axes:
    """Returns the axes of operands and one result: leading axes, then those named.

    Args:
        operands: shapes of the operands. An operand that is the same along a leading
            axis has size one there.
        names: names of the last axes of each operand, and of the result.
    """
    *operand_names, result_names = names
    (shape, *_), (trailing, *_) = operands, operand_names
    leading_names = leading(len(shape) - len(trailing))

    def name_axes(shape: tuple[int, ...], trailing: Names) -> Names:
        # An axis of size one stands for a longer one: every device needs it.
        sizes = shape[: len(leading_names)]
        divisible = (
            n if d > 1 else None for n, d in zip(leading_names, sizes, strict=True)
        )
        return *divisible, *trailing

    return Axes(
        tuple(map(name_axes, operands, operand_names)),
        ((*leading_names, *result_names),),
    )


def divide(
    function: Callable[..., Sequence[jax.Array]],
    axes: Axes,
    *arrays: jax.Array,
    unrounded: Callable[..., Sequence[jax.Array]] | None = None,
) -> Sequence[jax.Array]:
    """Calls ``function(*arrays)``; each device computes its own part.

    The caller lowers this with the mesh of `mesh_of`, and with devices in the context
    of the lowering.

    Args:
        function: computes a part of the results from the same part of each array.
        axes: axes that may be divided.
        *arrays: arguments of the function.
        unrounded: same as ``function``, with results in the dtype that parts are summed
            in; None if nothing is summed.
    """
    results = jax.eval_shape(function, *arrays)

    @custom_partitioning
    def divided(*arrays):
        return _part(function, results, *arrays)

    rule, sizes = _rule(axes, [x.shape for x in (*arrays, *results)])
    divided.def_partition(
        partition=functools.partial(_partition, function, unrounded, axes),
        sharding_rule=rule,
        # `_spec` decodes them instead, and skips arrays that are on one device only.
        decode_shardings=False,
        **sizes,
    )

    def named(*arrays):
        return divided(*arrays)

    # JAX's cache of programs knows a partition function only by its address. A function
    # for another codebook may have had the same address before.
    named.__name__ = f"divided_{uuid.uuid4().hex}"
    return jax.jit(named)(*arrays)


def mesh_of(num_devices: int) -> AbstractMesh | None:
    """Returns a mesh that can express any sharding over a power of two of devices.

    All its axes have size two. An axis of another mesh corresponds to several of them.
    Returns None if the number of devices is not a power of two.
    """
    count = num_devices.bit_length() - 1
    if num_devices != 2**count:
        return None
    return AbstractMesh((2,) * count, tuple(f"half{i}" for i in range(count)))


def _rule(axes: Axes, shapes: Sequence[tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Builds the Shardy rule, and the sizes of factors that cover only part of an axis.

    The rule is in einsum notation. If an axis of size 64 shares its name with one
    of size 16, its factors are 16 and 4. If it shares its name with one of size 1,
    neither is divided.
    """
    arrays = list(zip([*axes.operands, *axes.results], shapes, strict=True))
    smallest: dict[str | None, int] = {}
    for names, shape in arrays:
        for name, size in zip(names, shape, strict=True):
            smallest[name] = min(size, smallest.get(name, size))
    sizes = {}

    def factor(name: str | None, size: int, remainder: str) -> str:
        if name is None or smallest[name] <= 1:
            return remainder
        if size == smallest[name]:
            return name
        sizes[remainder] = size // smallest[name]
        return f"({name} {remainder})"

    terms = [
        " ".join(
            factor(name, size, f"only{i}x{j}")
            for j, (name, size) in enumerate(zip(names, shape, strict=True))
        )
        for i, (names, shape) in enumerate(arrays)
    ]
    count = len(axes.operands)
    return f"{', '.join(terms[:count])} -> {', '.join(terms[count:])}", sizes


def _partition(
    function: Callable[..., Sequence[jax.Array]],
    unrounded: Callable[..., Sequence[jax.Array]] | None,
    axes: Axes,
    mesh: Any,
    operands: Sequence[jax.ShapeDtypeStruct],
    results: Sequence[jax.ShapeDtypeStruct],
) -> tuple[Any, Callable[..., Any], list[NamedSharding], tuple[NamedSharding, ...]]:
    """Returns what each device computes, and how arrays are divided for it."""
    named = [
        *zip(axes.results, results, strict=True),
        *zip(axes.operands, operands, strict=True),
    ]
    division = _division(mesh, named)
    kept = {name for names in axes.results for name in names}
    summed_axes = [
        a for name, mesh_axes in division.items() if name not in kept for a in mesh_axes
    ]

    def divide_sizes(names: Names, shape: tuple[int, ...]) -> Iterator[int]:
        for name, size in zip(names, shape, strict=True):
            yield size // math.prod(mesh.shape[a] for a in division.get(name, ()))

    def compute_part(*arrays):
        if unrounded is None or not summed_axes:
            return function(*arrays)
        sums = jax.lax.psum(unrounded(*arrays), summed_axes)
        return [x.astype(y.dtype) for x, y in zip(sums, results, strict=True)]

    part_results = [
        jax.ShapeDtypeStruct(tuple(divide_sizes(names, x.shape)), x.dtype)
        for names, x in zip(axes.results, results, strict=True)
    ]

    def sharding(names: Names) -> NamedSharding:
        return NamedSharding(
            mesh, PartitionSpec(*(division.get(name) for name in names))
        )

    return (
        mesh,
        functools.partial(_part, compute_part, part_results),
        [sharding(names) for names in axes.results],
        tuple(sharding(names) for names in axes.operands),
    )


def _division(
    mesh: Any, named: Sequence[tuple[Names, jax.ShapeDtypeStruct]]
) -> Division:
    """Keeps the existing division. Where arrays disagree, the first one wins."""
    division: Division = {}
    for names, x in named:
        for name, mesh_axes in zip(names, _spec(mesh, x), strict=False):
            if name is None or name in division or not mesh_axes:
                continue
            taken = {a for others in division.values() for a in others}
            parts = math.prod(mesh.shape[a] for a in mesh_axes)
            sizes = (
                size
                for names, x in named
                for other, size in zip(names, x.shape, strict=True)
                if other == name
            )
            if taken.isdisjoint(mesh_axes) and all(size % parts == 0 for size in sizes):
                division[name] = mesh_axes
    return division


def _spec(mesh: Any, x: Any) -> Iterable[tuple[str, ...]]:
    """Returns the mesh axes that each leading axis is divided along."""
    try:
        (spec,) = parse_flatten_op_sharding(x.sharding._hlo_sharding, mesh)
    except (AssertionError, NotImplementedError):
        # The results of callbacks are on one device only.
        return ()
    return [(a,) if isinstance(a, str) else a or () for a in spec]


def _part(function, results: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array):
    return _part_p.bind(*arrays, function=function, results=tuple(results))


# A primitive that is traced only when it is lowered. Otherwise JAX would trace the
# function wherever the program is compiled, with the axes of a mesh that is set there.
_part_p = Primitive("part")
_part_p.multiple_results = True


@_part_p.def_abstract_eval
def _results(*_, results, **__):
    return [ShapedArray(x.shape, x.dtype) for x in results]


def lower_alone(ctx: Any, function: Callable[..., Any], *arrays: Any) -> Any:
    """Lowers a function of single-device arrays, outside any mesh."""
    with jax.sharding.use_abstract_mesh(lowered_for(ctx.module_context)):
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        lower = mlir.lower_fun(function, multiple_results=True)
        return lower(ctx.replace(avals_in=avals), *arrays)


def _lower_part(ctx, *arrays, function, **_):
    return lower_alone(ctx, function, *arrays)


mlir.register_lowering(_part_p, _lower_part)
