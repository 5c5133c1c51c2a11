"""Layouts: which mesh axes divide an array's axes, by their logical names."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jax.sharding import AbstractMesh, Mesh

from jaxbnb.core import QuantizedArray

# What a mesh axis is called says what it divides.
MESH_AXES: Final = ("data", "fsdp", "tensor", "expert")
LOGICAL_AXES: Final = ("embed", "mlp", "heads", "vocab", "layers", "expert")
PRESETS: Final = ("fsdp", "tensor", "fsdp+tensor")
# Counts of a config, and the logical axis that consists of so many parts.
COUNTS: Final = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "num_experts": "expert",
}
# Smaller arrays may be copied to every device.
SMALL: Final = 4096

# Inputs and outputs of each linear layer, by the last part of its path.
_LINEARS: Final = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "qkv_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "out_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "fc1": ("embed", "mlp"),
    "fc2": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
    "embed_tokens": ("vocab", "embed"),
}
_TENSOR_AXES: Final[tuple[str, ...]] = ("heads", "mlp", "vocab")
_STACKS: Final = {"layers": "layers", "experts": "expert"}

Names = tuple[str | None, ...]
# For each axis of an array, the mesh axes that divide it.
Division = tuple[tuple[str, ...], ...]
LogicalRules = Mapping[str, str | Sequence[str] | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How mesh axes divide arrays.

    Attributes:
        axes: mesh axes that divide each logical axis; a logical axis that is missing is
            not divided.
        spread: mesh axes that divide some axis of each matrix, whichever fits: never
            through a block of codes, which are gathered before they are used.
    """

    axes: Mapping[str, tuple[str, ...]]
    spread: tuple[str, ...] = ()

    def gathered(self) -> "Layout":
        """Returns the layout of weights that are in use."""
        return dataclasses.replace(self, spread=())


def find_layout(names: Sequence[str]) -> Layout:
    """Returns the layout that the names of mesh axes stand for.

    Example:
        >>> find_layout(("data", "fsdp")).spread
        ('fsdp',)
    """
    tensor = ("tensor",) if "tensor" in names else ()
    axes: dict[str, tuple[str, ...]] = dict.fromkeys(_TENSOR_AXES, tensor)
    if "expert" in names:
        axes["expert"] = ("expert",)
    return Layout(axes, ("fsdp",) if "fsdp" in names else ())


def use_preset(mesh: Any, preset: str) -> Any:
    """Returns the mesh with the axes that a preset needs.

    The only axis of a mesh serves under any name.

    Raises:
        ValueError: the preset is unknown, the mesh lacks an axis that it needs, or has
            one that it leaves idle.

    Example:
        >>> import jax
        >>> use_preset(jax.sharding.AbstractMesh((4,), ("x",)), "fsdp").axis_names
        ('fsdp',)
    """
    if preset not in PRESETS:
        raise ValueError(
            f"sharding must be one of {', '.join(map(repr, PRESETS))}, a mapping of "
            f"logical axes, or (names, PartitionSpec) pairs; got {preset!r}"
        )
    needed = preset.split("+")
    names = tuple(mesh.axis_names)
    if len(names) == len(needed) == 1 and names[0] not in MESH_AXES:
        if isinstance(mesh, AbstractMesh):
            return AbstractMesh(mesh.axis_sizes, tuple(needed))
        return Mesh(mesh.devices, tuple(needed))
    problems = {
        "does not have": [name for name in needed if name not in names],
        "has the unknown": [name for name in names if name not in MESH_AXES],
        "would leave idle": [
            name
            for name in ("fsdp", "tensor")
            if name not in needed and mesh.shape.get(name, 1) > 1
        ],
    }
    found = [f"{what} {which}" for what, which in problems.items() if which]
    if found:
        raise ValueError(
            f"sharding={preset!r} needs a mesh with the axes {needed}; others may be "
            f"'data' and 'expert'. This one, {dict(mesh.shape)}, {' and '.join(found)}"
        )
    return mesh


def check_logical_rules(rules: LogicalRules, mesh: Any) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes of each logical axis.

    Raises:
        ValueError: a logical axis or a mesh axis is unknown.
    """
    axes = {}
    for name, value in rules.items():
        if name not in LOGICAL_AXES:
            raise ValueError(
                f"logical axes are {', '.join(LOGICAL_AXES)}; got {name!r}"
            )
        mesh_axes = (value,) if isinstance(value, str) else tuple(value or ())
        for axis in mesh_axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"{name!r} is to be divided along {axis!r}, and the mesh has the "
                    f"axes {tuple(mesh.axis_names)}"
                )
        axes[name] = mesh_axes
    return axes


def check_heads(config: Any, layout: Layout, mesh: Any) -> None:
    """Checks that each device of a mesh has whole heads and whole experts.

    Args:
        config: sizes of attention and MLP, e.g. a `jaxbnb.models.DecoderConfig`.
        layout: the layout.
        mesh: a mesh, which may be abstract.

    Raises:
        ValueError: the mesh would divide single heads or experts.

    Example:
        >>> import jax, types
        >>> config = types.SimpleNamespace(
        ...     num_attention_heads=8, num_key_value_heads=4, num_experts=0)
        >>> mesh = jax.sharding.AbstractMesh((4,), ("tensor",))
        >>> check_heads(config, find_layout(mesh.axis_names), mesh)
    """
    for name, logical in COUNTS.items():
        axes, count = layout.axes.get(logical, ()), getattr(config, name)
        size = _count(mesh, axes)
        if count % size or (size > 1 and not count):
            if not count:
                raise ValueError(
                    f"the mesh axes {axes} have {size} devices for the model's {name}, "
                    "and it has none"
                )
            fits = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"the mesh axes {axes} have {size} devices, and the model has "
                f"{name}={count}; sizes that divide it are {fits}"
            )


def logical_names(path: Sequence[str], ndim: int) -> Names:
    """Returns the logical name of each axis of a variable, as far as it has one.

    Args:
        path: parts of the variable's path; an optimizer's state may be around it.
        ndim: number of axes.

    Example:
        >>> logical_names(("layers", "layer", "mlp", "up_proj", "kernel"), 3)
        ('layers', 'embed', 'mlp')
        >>> logical_names(("q_proj", "adapters", "default", "lora_b"), 2)
        (None, 'heads')
    """
    linears = [_LINEARS[part] for part in path if part in _LINEARS]
    inputs, outputs = linears[-1] if linears else (None, None)
    stack = find_stacks(path)
    last: Names = {
        "kernel": (inputs, outputs),
        "embedding": (inputs, outputs),
        "lora_a": (inputs, None),
        "lora_b": (None, outputs),
        "bias": (outputs,),
        "magnitude": (outputs,),
        "scale": (None,),
    }.get(path[-1] if path else "", ())
    if "biases" in path:
        last = (outputs,)
    if not last or len(stack) + len(last) != ndim:
        # Unknown: all that is sure is where stacks begin.
        kept = stack[: max(0, ndim - 1)]
        return (*kept, *[None] * (ndim - len(kept)))
    return (*stack, *last)


def find_stacks(path: Sequence[str]) -> list[str]:
    """Returns the logical names of the axes that stack layers or experts.

    Example:
        >>> find_stacks(("layers", "layer", "mlp", "experts", "layer", "up_proj"))
        ['layers', 'expert']
    """
    return [
        _STACKS[part]
        for part, after in itertools.pairwise(path)
        if part in _STACKS and after == "layer"
    ]


def divide(
    path: Sequence[str], value: Any, layout: Layout, mesh: Any, *, is_frozen: bool
) -> Division:
    """Returns the mesh axes that divide each axis of an array.

    Args:
        path: parts of the variable's path.
        value: array or its shape; may be a `QuantizedArray`.
        layout: the layout.
        mesh: a mesh, which may be abstract.
        is_frozen: whether plain matrices are not trained. The head may then be divided
            along the vocabulary, through blocks that moments would have.

    Raises:
        ValueError: a mesh axis does not divide an axis that the layout says it divides,
            or no axis of a large matrix can be spread.
    """
    names = logical_names(path, value.ndim)
    units = _count_units(value)
    division = [
        tuple(a for a in layout.axes.get(name or "", ()) if a in mesh.axis_names)
        for name in names
    ]
    for i, axes in enumerate(division):
        count = _count(mesh, axes)
        if units[i] % count == 0:
            continue
        if _is_small(value):
            division[i] = ()
            continue
        fits = [n for n in range(1, units[i] + 1) if units[i] % n == 0]
        is_cut = units[i] != value.shape[i]
        hint = "; a smaller block_size gives more blocks" if is_cut else ""
        what = f"{units[i]} blocks" if is_cut else f"{units[i]}"
        raise ValueError(
            f"{'.'.join(path)} of shape {tuple(value.shape)} has {what} along its axis "
            f"{names[i]!r}, and {count} devices of {axes} do not divide that; sizes "
            f"that do are {_shorten(fits)}{hint}"
        )
    spread = tuple(a for a in layout.spread if mesh.shape.get(a, 1) > 1)
    num_stacks = sum(name in ("layers", "expert") for name in names)
    if not spread or value.ndim - num_stacks < 2:
        return tuple(division)
    order = _order_axes(value, names, is_frozen)
    for i in order:
        axes = (*division[i], *spread)
        if units[i] % _count(mesh, axes) == 0:
            division[i] = axes
            return tuple(division)
    if not _is_small(value):
        count, numbers = _count(mesh, spread), [units[i] for i in order]
        fits = [n for n in range(1, count) if any(x % n == 0 for x in numbers)]
        raise ValueError(
            f"{'.'.join(path)} of shape {tuple(value.shape)} cannot be divided among "
            f"{count} devices of {spread}: none of the numbers {numbers}, of rows or "
            f"blocks, is a multiple. {fits[-1]} devices would fit"
        )
    return tuple(division)


def _order_axes(value: Any, names: Names, is_frozen: bool) -> list[int]:
    """Returns the axes to spread along, the best one first."""
    last, before = value.ndim - 1, value.ndim - 2
    if isinstance(value, QuantizedArray):
        # Blocks stay whole along the other axis, however many there are.
        return [before, last] if value.axis == -1 else [last, before]
    if names[last] == "vocab" and is_frozen:
        # The logits of a part of the vocabulary need no other part of the head.
        return [last, before]
    # Blocks of moments run along the last axis.
    return [before, last]


def _count_units(value: Any) -> list[int]:
    """Returns how many whole blocks, or single rows, each axis consists of."""
    units = list(value.shape)
    if isinstance(value, QuantizedArray):
        size, block = value.axis_size, value.block_size
        units[value.axis] = size // block if size % block == 0 else 1
    return units


def _count(mesh: Any, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _is_small(value: Any) -> bool:
    return math.prod(value.shape) < SMALL


def _shorten(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown + (", ..." if len(numbers) > 12 else "")
