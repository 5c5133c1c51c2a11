"""The operands of a step as a flat list of arrays, for the primitive and the kernel."""

import dataclasses
from typing import Any

from jaxbnb_kernels.update_8bit.moment import BlockLayout
from jaxbnb_kernels.update_8bit.rule import Rule


@dataclasses.dataclass(frozen=True)
class Step:
    """The static description of a step: hashable, independent of array values.

    Attributes:
        rule: what happens to an element.
        scalars: tree structure of the rule's scalars.
        signed: whether each moment's codes use the signed map.
        layout: layout of the blocks.
    """

    rule: Rule
    scalars: Any
    signed: tuple[bool, ...]
    layout: BlockLayout


def by_name(arrays, num_moments: int):
    """Splits a list of operands into ``(grad, param or None, codes, absmax)``."""
    split = len(arrays) - 2 * num_moments
    grad, *param = arrays[:split]
    state = arrays[split:]
    return grad, *(param or [None]), state[:num_moments], state[num_moments:]


def by_rule(scalars: Any, step: Step, *example: Any) -> Any:
    """Unpacks the scalars of one example into the tree that the rule takes."""
    count = step.scalars.num_leaves
    return step.scalars.unflatten([scalars[*example, i] for i in range(count)])
