"""Kernels on arrays that the compiler divides among devices: each computes its part.

XLA's partitioner cannot look into a kernel. So it is told which axes may be divided, by
names: axes of one name are divided alike, wherever they occur.
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
    """Names of as many leading axes."""
    return tuple(f"leading{i}" for i in range(count))


def of_matrices(operands: Sequence[tuple[int, ...]], names: Sequence[Names]) -> Axes:
    """The axes of operands and one result that have leading axes beside those named.

    Args:
        operands: their shapes. Leading axes are of one in those that are the same
            along them.
        names: names of the last axes of each operand, and of the result.
    """
    *of_operands, of_result = names
    (shape, *_), (own, *_) = operands, of_operands
    all_leading = leading(len(shape) - len(own))

    def of(shape: tuple[int, ...], own: Names) -> Names:
        # Where an axis of one stands for a longer one, every device has it.
        sizes = shape[: len(all_leading)]
        shared = (n if d > 1 else None for n, d in zip(all_leading, sizes, strict=True))
        return *shared, *own

    return Axes(tuple(map(of, operands, of_operands)), ((*all_leading, *of_result),))


def divide(
    function: Callable[..., Sequence[jax.Array]],
    axes: Axes,
    *arrays: jax.Array,
    unrounded: Callable[..., Sequence[jax.Array]] | None = None,
) -> Sequence[jax.Array]:
    """Calls ``function(*arrays)``; each device computes its own part.

    To be lowered with the mesh of `mesh_of` and devices in the lowering's context.

    Args:
        function: function of the same part of each array.
        axes: axes that may be divided.
        *arrays: arguments of the function.
        unrounded: the same in a dtype to sum parts in; None if nothing is summed.
    """
    results = jax.eval_shape(function, *arrays)

    @custom_partitioning
    def divided(*arrays):
        return _part(function, results, *arrays)

    rule, sizes = _rule(axes, [x.shape for x in (*arrays, *results)])
    divided.def_partition(
        partition=functools.partial(_partition, function, unrounded, axes),
        sharding_rule=rule,
        # By `_spec`, which passes over what is on one device only.
        decode_shardings=False,
        **sizes,
    )

    def named(*arrays):
        return divided(*arrays)

    # JAX's cache of programs knows a partition function by its address alone, at which
    # another may have been before: one of another codebook.
    named.__name__ = f"divided_{uuid.uuid4().hex}"
    return jax.jit(named)(*arrays)


def mesh_of(num_devices: int) -> AbstractMesh | None:
    """Returns a mesh that can express any sharding over a power of two of devices.

    All its axes have size two. An axis of another mesh is several of these.
    """
    count = num_devices.bit_length() - 1
    if num_devices != 2**count:
        return None
    return AbstractMesh((2,) * count, tuple(f"half{i}" for i in range(count)))


def _rule(axes: Axes, shapes: Sequence[tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Builds the Shardy rule, and the sizes of factors that cover only part of an axis.

    The rule is in einsum notation. If an axis of 64 shares its name with one of 16, its
    factors are 16 and 4; with one of 1, neither is divided.
    """
    arrays = list(zip([*axes.operands, *axes.results], shapes, strict=True))
    least: dict[str | None, int] = {}
    for names, shape in arrays:
        for name, size in zip(names, shape, strict=True):
            least[name] = min(size, least.get(name, size))
    sizes = {}

    def factor(name: str | None, size: int, alone: str) -> str:
        if name is None or least[name] <= 1:
            return alone
        if size == least[name]:
            return name
        sizes[alone] = size // least[name]
        return f"({name} {alone})"

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
    """What each device computes, and how arrays are divided for it."""
    named = [
        *zip(axes.results, results, strict=True),
        *zip(axes.operands, operands, strict=True),
    ]
    division = _division(mesh, named)
    kept = {name for names in axes.results for name in names}
    summed = [
        a for name, of_mesh in division.items() if name not in kept for a in of_mesh
    ]

    def sizes_of_part(names: Names, shape: tuple[int, ...]) -> Iterator[int]:
        for name, size in zip(names, shape, strict=True):
            yield size // math.prod(mesh.shape[a] for a in division.get(name, ()))

    def summed_up(*arrays):
        if unrounded is None or not summed:
            return function(*arrays)
        sums = jax.lax.psum(unrounded(*arrays), summed)
        return [x.astype(y.dtype) for x, y in zip(sums, results, strict=True)]

    of_part = [
        jax.ShapeDtypeStruct(tuple(sizes_of_part(names, x.shape)), x.dtype)
        for names, x in zip(axes.results, results, strict=True)
    ]

    def sharding(names: Names) -> NamedSharding:
        return NamedSharding(
            mesh, PartitionSpec(*(division.get(name) for name in names))
        )

    return (
        mesh,
        functools.partial(_part, summed_up, of_part),
        [sharding(names) for names in axes.results],
        tuple(sharding(names) for names in axes.operands),
    )


def _division(
    mesh: Any, named: Sequence[tuple[Names, jax.ShapeDtypeStruct]]
) -> Division:
    """Keeps the existing division. Where arrays disagree, the first one wins."""
    division: Division = {}
    for names, x in named:
        for name, of_mesh in zip(names, _spec(mesh, x), strict=False):
            if name is None or name in division or not of_mesh:
                continue
            taken = {a for others in division.values() for a in others}
            parts = math.prod(mesh.shape[a] for a in of_mesh)
            sizes = (
                size
                for names, x in named
                for other, size in zip(names, x.shape, strict=True)
                if other == name
            )
            if taken.isdisjoint(of_mesh) and all(size % parts == 0 for size in sizes):
                division[name] = of_mesh
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
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        lower = mlir.lower_fun(function, multiple_results=True)
        return lower(ctx.replace(avals_in=avals), *arrays)


def _lower_part(ctx, *arrays, function, **_):
    return lower_alone(ctx, function, *arrays)


mlir.register_lowering(_part_p, _lower_part)
