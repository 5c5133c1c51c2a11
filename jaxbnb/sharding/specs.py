"""partition_specs: how a mesh divides a tree of weights, adapters or moments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb.core import QuantizedArray
from jaxbnb.core.parts import make_even_spec, map_parts
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import check_rules
from jaxbnb.sharding.layout import (
    COUNTS,
    Layout,
    LogicalRules,
    check_heads,
    check_logical_rules,
    divide,
    find_layout,
    find_stacks,
    use_preset,
)

PathRule = tuple[str | Sequence[str], PartitionSpec]
_MATRICES: Final = ("kernel", "embedding", "lora_a", "lora_b")
_VARIABLE: Final = ("value", "raw_value")
# How many arrays an error names.
_SHOWN: Final = 4

Sharding = str | LogicalRules | Sequence[PathRule] | None


def partition_specs(tree: Any, mesh: Any, sharding: Sharding = None) -> Any:
    """Returns the spec of each array of a tree: how a mesh divides it.

    The tree may hold weights, quantised or not, adapters, or the state of an optimizer
    of `jaxbnb.optim` or Optax. Codes and absmax follow their weight, and moments their
    parameter. No device gets a part of a block of codes, and none a part of a block of
    moments unless it is the only way.

    Args:
        tree: pytree of arrays or their ``jax.ShapeDtypeStruct``, e.g. an ``nnx.State``;
            or an NNX model.
        mesh: the mesh, which may be abstract.
        sharding: "fsdp", "tensor", "fsdp+tensor", a mapping from logical axes (embed,
            mlp, heads, vocab, layers, expert) to mesh axes, or ``(names, spec)`` pairs
            as `jaxbnb.load_pretrained` takes them. None for what the mesh axes are
            called: fsdp, tensor and expert divide weights, others do not.

    Returns:
        The tree with a ``PartitionSpec`` in place of each array. An NNX model gives the
        specs of its ``nnx.state``.

    Raises:
        TypeError: ``sharding`` is none of the above.
        ValueError: a preset does not suit the mesh, or the mesh does not divide the
            heads, experts, blocks or rows of an array; the message lists them all.

    Example:
        >>> import jax, jaxbnb
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
        >>> w = jax.ShapeDtypeStruct((256, 128), "float32")
        >>> q = jaxbnb.quantize(w, "nf4", axis=-2)
        >>> partition_specs({"w": w, "q": q}, mesh)["w"]
        P('fsdp', None)
        >>> partition_specs({"w": w, "q": q}, mesh)["q"].absmax
        P('fsdp', None)
    """
    used = use_preset(mesh, sharding) if isinstance(sharding, str) else mesh
    if isinstance(tree, nnx.Module):
        _check_modules(tree, used, sharding)
        tree = nnx.state(tree)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_quantized)
    named = {path_names(path): leaf for path, leaf in leaves}
    found = specs_of(named, used, sharding)
    if used.axis_names != mesh.axis_names:
        names = dict(zip(used.axis_names, mesh.axis_names, strict=True))
        found = jax.tree.map(lambda spec: _rename(spec, names), found, is_leaf=_is_spec)
    return treedef.unflatten([found[path_names(path)] for path, _ in leaves])


def _check_modules(model: nnx.Module, mesh: Any, sharding: Sharding) -> None:
    """Checks the heads and experts of each module with a config that counts them."""
    layout = choose_layout(mesh, sharding)
    if layout is None:
        return
    for _, module in nnx.iter_modules(model):
        config = getattr(module, "config", None)
        if all(hasattr(config, name) for name in COUNTS):
            check_heads(config, layout, mesh)


def choose_layout(mesh: Any, sharding: Sharding) -> Layout | None:
    """Returns the layout that an argument ``sharding`` stands for.

    Args:
        mesh: a mesh that `use_preset` returns.
        sharding: see `partition_specs`.

    Returns:
        The layout; None for pairs of names and specs, which need none.

    Raises:
        TypeError: ``sharding`` has a type that `partition_specs` does not take.
        ValueError: a logical axis or a mesh axis is unknown.

    Example:
        >>> import jax
        >>> choose_layout(jax.sharding.AbstractMesh((4,), ("fsdp",)), "fsdp").spread
        ('fsdp',)
    """
    if isinstance(sharding, Mapping):
        return Layout(check_logical_rules(sharding, mesh))
    if sharding is None or isinstance(sharding, str):
        return find_layout(mesh.axis_names)
    if isinstance(sharding, Sequence):
        return None
    raise TypeError(
        "sharding must be a preset's name, a mapping from logical axes to mesh "
        f"axes, or (names, PartitionSpec) pairs; got {type(sharding).__name__}"
    )


def specs_of(
    variables: Mapping[tuple[str, ...], Any], mesh: Any, sharding: Sharding
) -> dict[tuple[str, ...], Any]:
    """Returns the spec of each array, by path; see `partition_specs`.

    The mesh is one that `use_preset` returns.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
        >>> specs_of({("w",): jax.ShapeDtypeStruct((8, 512), "float32")}, mesh, None)
        {('w',): P('fsdp', None)}
    """
    layout = choose_layout(mesh, sharding)
    if layout is None:
        return _apply_path_rules(variables, mesh, sharding)
    is_frozen = any(map(_is_quantized, variables.values()))
    found, problems = {}, []
    for path, value in variables.items():
        try:
            division = divide(path, value, layout, mesh, is_frozen=is_frozen)
        except ValueError as error:
            problems.append(str(error))
            continue
        found[path] = _make_specs(value, [axes or None for axes in division], mesh)
    if problems:
        hidden = len(problems) - _SHOWN
        if hidden > 0:
            problems[_SHOWN:] = [f"and {hidden} more"]
        raise ValueError(
            f"the mesh {dict(mesh.shape)} does not fit:\n  " + "\n  ".join(problems)
        )
    return found


def make_shardings(specs: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a tree of specs.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> make_shardings(PartitionSpec("fsdp"), mesh).spec
        P('fsdp',)
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _apply_path_rules(
    variables: Mapping[tuple[str, ...], Any], mesh: Any, rules: Any
) -> dict[tuple[str, ...], Any]:
    """Returns the specs that pairs of names and specs give."""
    check_rules(rules, "(names, PartitionSpec) pairs")
    unused = {id(rule): rule for rule in rules}
    found, problems = {}, []
    for path, value in variables.items():
        name, spec = ".".join(path), PartitionSpec()
        for rule in rules:
            if matches(name, rule[0]):
                spec = rule[1]
                unused.pop(id(rule), None)
                break
        is_matrix = path[-1] in _MATRICES and value.ndim > 1
        rank = 2 if is_matrix else value.ndim - len(find_stacks(path))
        # A longer spec names the axes of a stack, too, such as that of experts.
        rank = max(rank, min(len(spec), value.ndim))
        if len(spec) > rank:
            problems.append(f"{name} has {rank} axes, {spec} has {len(spec)}")
            continue
        axes = [None] * (value.ndim - rank) + [*spec] + [None] * (rank - len(spec))
        problem = _find_problem(name, value, axes, mesh)
        if problem is None:
            found[path] = _make_specs(value, axes, mesh)
        else:
            problems.append(problem)
    problems += [f"no variable is named {rule[0]!r}" for rule in unused.values()]
    if problems:
        raise ValueError("rules do not fit the model:\n  " + "\n  ".join(problems))
    return found


def _find_problem(name: str, value: Any, axes: list[Any], mesh: Any) -> str | None:
    """Says why a mesh does not divide an array as a rule asks; None if it does."""
    unknown = {a for axis in axes for a in as_tuple(axis)} - set(mesh.axis_names)
    if unknown:
        return f"{name}: {sorted(unknown)} not found in mesh {dict(mesh.shape)}"
    parts = [math.prod(mesh.shape[a] for a in as_tuple(axis)) for axis in axes]
    checked = [(tuple(value.shape), parts)]
    if _is_quantized(value):
        # Absmax may be copied, but two codes of four bits share a byte.
        stored = list(parts)
        stored.append(stored.pop(value.axis))
        checked.append((tuple(value.codes.shape), stored))
    for shape, counts in checked:
        if any(n % k for n, k in zip(shape, counts, strict=True)):
            return f"{name}: {shape} is not divisible by {counts}"
    return None


def _make_specs(value: Any, axes: Sequence[Any], mesh: Any) -> Any:
    """Returns the spec of an array, or of each part of a quantised one."""

    def make(x: Any, names: Sequence[Any]) -> PartitionSpec:
        return make_even_spec(x.shape, names, mesh)

    if _is_quantized(value):
        return map_parts(value, axes, make)
    return make(value, axes)


def as_tuple(axis: Any) -> tuple[str, ...]:
    """Returns the mesh axes in an entry of a spec.

    Example:
        >>> as_tuple(None), as_tuple("data")
        ((), ('data',))
    """
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the parts of a path in a pytree, without those of NNX's variables.

    Example:
        >>> import jax
        >>> path_names(jax.tree_util.tree_leaves_with_path({"a": [1]})[0][0])
        ('a', '0')
    """
    names = (
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    )
    return tuple(name for name in names if name not in _VARIABLE)


def _rename(spec: PartitionSpec, names: Mapping[str, str]) -> PartitionSpec:
    def rename(axis: Any) -> Any:
        if isinstance(axis, tuple):
            return tuple(names[a] for a in axis)
        return None if axis is None else names[axis]

    return PartitionSpec(*map(rename, spec))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)
