"""Matches the parameters of a bitsandbytes optimizer with the state of ``tx``."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax
import optax

from jaxbnb.convert._bitsandbytes_state import FAMILIES
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.core.paths import matches
from jaxbnb.optim.rules import flatten_with_paths
from jaxbnb.optim.state_layout import StateLayout

# Parameters that are (in, out) in Flax and in jaxbnb.lora, and (out, in) in torch.
KERNELS: Final = ("kernel", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters, as ``params`` and the optimizer have them.

    Attributes:
        paths: dotted path of each leaf of ``params``.
        order: index among the leaves of each parameter of the optimizer.
        is_transposed: whether torch has the axes of a leaf the other way round.
    """

    paths: list[str]
    order: list[int]
    is_transposed: list[bool]

    def torch_axes(self, index: int, ndim: int) -> tuple[int, ...]:
        """Returns the axes of a leaf in the order that torch has them."""
        if ndim < 2 or not self.is_transposed[index]:
            return tuple(range(ndim))
        return (ndim - 1, ndim - 2, *range(ndim - 2))


def list_parameters(
    params: Any, order: Sequence[str] | None, transposed: str | Sequence[str]
) -> Parameters:
    """Lists the parameters; see `optimizer_state_from_bitsandbytes` for the arguments.

    Raises:
        ValueError: ``order`` or ``transposed`` names a parameter that does not exist.
    """
    paths, _, _ = flatten_with_paths(params)
    indices = list(range(len(paths)))
    if order is not None:
        missing = [path for path in order if path not in paths]
        if missing or len(set(order)) < len(order):
            raise ValueError(
                f"order must have each parameter once; got {missing or order}, and "
                f"the parameters are {paths}"
            )
        indices = [paths.index(path) for path in order]
    # The default may match nothing. Any other pattern that does is a mistake.
    if transposed != KERNELS:
        is_regex = isinstance(transposed, str)
        for pattern in [transposed] if is_regex else transposed:
            if not any(matches(p, pattern if is_regex else (pattern,)) for p in paths):
                raise ValueError(
                    f"transposed has {pattern!r}, which matches none of {paths}"
                )
    return Parameters(paths, indices, [matches(path, transposed) for path in paths])


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where the state of one parameter is.

    Attributes:
        index: index of the parameter among the leaves of ``params``.
        family: name of the type of Optax's state.
        places: indices of its moments among the leaves of the 32-bit state.
        count: index of its count among the leaves of the state of ``tx``, or None.
    """

    index: int
    family: str
    places: tuple[int, ...]
    count: int | None


def find_slots(layout: StateLayout, params: Any) -> list[list[Slot]]:
    """Finds the states of each parameter that bitsandbytes has as well."""
    structure = jax.tree.structure(params)
    indices = structure.unflatten(range(structure.num_leaves))
    wide = jax.tree.structure(layout.in_32_bits)
    nodes = jax.tree.leaves(
        wide.unflatten(range(wide.num_leaves)),
        is_leaf=lambda node: type(node).__name__ in FAMILIES,
    )
    slots: list[list[Slot]] = [[] for _ in range(structure.num_leaves)]
    for node in nodes:
        family = type(node).__name__
        columns = [
            _pair_with_parameters(getattr(node, moment.field), indices)
            for moment in FAMILIES.get(family, ())
        ]
        for row in zip(*columns, strict=True):
            places = tuple(place for place, _ in row)
            count = layout.places[places[0]].count
            if "count" in node._fields:
                count = layout.places[node.count].position
            _, index = row[0]
            slots[index].append(Slot(index, family, places, count))
    return slots


def get_slot(slots: list[list[Slot]], index: int, name: str) -> Slot:
    """Returns the state of a parameter, which must be a single one.

    Args:
        slots: result of `find_slots`.
        index: index of the parameter.
        name: name of the parameter in the error.

    Raises:
        CheckpointError: ``tx`` keeps no state of a known type, or several.
    """
    if len(slots[index]) != 1:
        families = " and ".join(slot.family for slot in slots[index]) or "none"
        raise CheckpointError(
            f"{name}: an optimizer of bitsandbytes keeps exactly one of "
            f"{', '.join(sorted(FAMILIES))}; tx keeps {families} of them"
        )
    return slots[index][0]


def _pair_with_parameters(moments: Any, indices: Any) -> list[tuple[int, int]]:
    """Returns the place of each array of a moment, and the index of its parameter."""
    places, structure = jax.tree.flatten(
        moments, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    try:
        owners = structure.flatten_up_to(indices)
    except (TypeError, ValueError):
        owners = [None] * len(places)
    pairs: list[Any] = [
        (place, owner)
        for place, owner in zip(places, owners, strict=True)
        if not isinstance(place, optax.MaskedNode)
    ]
    if not all(isinstance(owner, int) for _, owner in pairs):
        raise CheckpointError(
            "tx keeps its moments in a tree that differs from the parameters' tree, as "
            "optax.flatten does"
        )
    return pairs
