"""Where the variables of a model go on a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb.core import QuantizedArray
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import check_rules
from jaxbnb.models._places import Place

ShardingRule = tuple[str | Sequence[str], PartitionSpec]


def shardings(
    variables: Mapping[Any, Any], mesh: Mesh | None, rules: Sequence[ShardingRule]
) -> dict[Any, Any]:
    """The sharding of each variable, or a tree of them for a quantised one.

    Codes and absmax of a kernel ``(in, out)`` are ``(out, in)``; an absmax that is
    itself quantised has its own, of a few bytes, on every device.

    Args:
        variables: path -> variable, abstract.
        mesh: None for no sharding: the result is then empty.
        rules: as of `load_pretrained`.

    Raises:
        TypeError: rules that are not pairs.
        ValueError: rules without a mesh, that name no variable, or that do not divide
            what they name; the message lists all.
    """
    check_rules(rules, "(names, PartitionSpec) pairs")
    if mesh is None:
        if rules:
            raise ValueError("rules say how a mesh divides a model; give the mesh too")
        return {}
    # Values are made by jit, which must be free to move them: of automatic axes.
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
        found[path] = jax.tree.map_with_path(
            lambda key, leaf, axes=axes, value=value: _sharding(
                mesh, key, leaf, axes, value
            ),
            value,
        )
        leaves, placed = jax.tree.leaves(value), jax.tree.leaves(found[path])
        if isinstance(value, QuantizedArray):
            # What is quantised is divided before it is.
            leaves, placed = [*leaves, value.mT], [*placed, found[path].codes]
        for leaf, sharding in zip(leaves, placed, strict=True):
            sizes = [_divisor(mesh, axis) for axis in sharding.spec]
            if any(n % k for n, k in zip(leaf.shape, sizes, strict=False)):
                problems.append(f"{name}: {leaf.shape} is not divided by {sizes}")
    problems += [f"no variable is named {rule[0]!r}" for rule in unused.values()]
    if problems:
        raise ValueError("rules that do not fit the model:\n  " + "\n  ".join(problems))
    return found


def layer_sharding(
    sharding: Any, place: Place, tensor: np.ndarray | QuantizedArray
) -> Any:
    """The sharding of a tensor by which each device has what goes into its stack.

    Args:
        sharding: of the stack, or a tree of them for a quantised one.
        place: of the tensor in it.
        tensor: as `Place.part` gives it, a kernel ``(out, in)``.
    """

    def without_stack(stacked: NamedSharding) -> NamedSharding:
        spec = PartitionSpec(*stacked.spec[len(place.index) :])
        return NamedSharding(stacked.mesh, spec)

    if isinstance(tensor, QuantizedArray):
        return jax.tree.map(without_stack, sharding)
    if isinstance(sharding, QuantizedArray):
        # The codes of a kernel lie as its tensor does.
        codes: Any = sharding.codes
        return without_stack(codes)
    one = without_stack(sharding)
    if place.is_kernel:
        return NamedSharding(one.mesh, PartitionSpec(*reversed(one.spec)))
    return one


def _sharding(
    mesh: Mesh, key: Sequence[Any], leaf: Any, axes: list[Any], value: Any
) -> NamedSharding:
    if isinstance(value, QuantizedArray):
        if key[0].name not in ("codes", "absmax"):
            return NamedSharding(mesh, PartitionSpec())
        axes = axes if value.axis == -1 else axes[::-1]
    stack = [None] * (len(leaf.shape) - len(axes))
    return NamedSharding(mesh, PartitionSpec(*stack, *axes))


def _divisor(mesh: Mesh, axis: Any) -> int:
    """Into how many parts a part of a spec divides an axis."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)
