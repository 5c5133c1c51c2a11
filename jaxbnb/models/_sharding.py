"""How a mesh divides the variables of a model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb.core import QuantizedArray
from jaxbnb.core.parts import with_axes
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import check_rules
from jaxbnb.models._places import Place

ShardingRule = tuple[str | Sequence[str], PartitionSpec]


def make_shardings(
    variables: Mapping[Any, Any], mesh: Mesh | None, rules: Sequence[ShardingRule]
) -> dict[Any, Any]:
    """Returns the sharding of each variable, or a tree of shardings if it is quantised.

    Codes and absmax of a kernel ``(in, out)`` are ``(out, in)``. The absmax of absmax,
    a few bytes, are copied to every device.

    Args:
        variables: abstract variables by path.
        mesh: the mesh; None returns an empty dict.
        rules: see `load_pretrained`.

    Raises:
        TypeError: rules are not pairs.
        ValueError: there are rules and no mesh, or some rules name no variable or do
            not divide the variables that they name; the message lists them all.
    """
    check_rules(rules, "(names, PartitionSpec) pairs")
    if mesh is None:
        if rules:
            raise ValueError("rules say how a mesh divides a model; give the mesh too")
        return {}
    # jit makes the values and must be free to move them, so the axes are automatic.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    unused = {id(rule): rule for rule in rules}
    found, problems = {}, []
    for path, variable in variables.items():
        name, value = ".".join(path), variable.get_value()
        spec = PartitionSpec()
        for rule in rules:
            if matches(name, rule[0]):
                spec = rule[1]
                unused.pop(id(rule), None)
                break
        rank = 2 if path[-1] in ("kernel", "embedding") else 1
        axes = [*spec, *[None] * (rank - len(spec))]
        if len(axes) != rank:
            problems.append(f"{name} has {rank} axes, {spec} has {len(spec)}")
            continue
        found[path] = _make_sharding(mesh, value, axes)
        leaves, placed = jax.tree.leaves(value), jax.tree.leaves(found[path])
        if isinstance(value, QuantizedArray):
            # The weight is divided before it is quantised, so check that too.
            leaves, placed = [*leaves, value.mT], [*placed, found[path].codes]
        for leaf, sharding in zip(leaves, placed, strict=True):
            sizes = [_count_parts(mesh, axis) for axis in sharding.spec]
            if any(n % k for n, k in zip(leaf.shape, sizes, strict=False)):
                problems.append(f"{name}: {leaf.shape} is not divisible by {sizes}")
    problems += [f"no variable is named {rule[0]!r}" for rule in unused.values()]
    if problems:
        raise ValueError("rules do not fit the model:\n  " + "\n  ".join(problems))
    return found


def make_layer_sharding(
    sharding: Any, place: Place, tensor: np.ndarray | QuantizedArray
) -> Any:
    """Returns a tensor's sharding that gives each device its own share of the stack.

    Args:
        sharding: sharding of the stack, or a tree of shardings if it is quantised.
        place: place of the tensor in the stack.
        tensor: result of `Place.part`; a kernel is ``(out, in)``.
    """

    def without_stack(stacked: NamedSharding) -> NamedSharding:
        spec = PartitionSpec(*stacked.spec[len(place.index) :])
        return NamedSharding(stacked.mesh, spec)

    if isinstance(tensor, QuantizedArray):
        return jax.tree.map(without_stack, sharding)
    if isinstance(sharding, QuantizedArray):
        # Codes of a kernel have the layout of its tensor.
        codes: Any = sharding.codes
        return without_stack(codes)
    single = without_stack(sharding)
    if place.is_kernel:
        return NamedSharding(single.mesh, PartitionSpec(*reversed(single.spec)))
    return single


def _make_sharding(mesh: Mesh, value: Any, axes: list[Any]) -> Any:
    """Returns the sharding of a variable, given that of its last axes."""

    def make(_: Any, names: Sequence[Any]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*names))

    names = [*[None] * (value.ndim - len(axes)), *axes]
    if isinstance(value, QuantizedArray):
        return with_axes(value, names, make)
    return make(value, names)


def _count_parts(mesh: Mesh, axis: Any) -> int:
    """Returns the number of parts that an entry of a spec divides its axis into."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)
