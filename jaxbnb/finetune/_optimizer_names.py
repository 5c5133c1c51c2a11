"""The optimizers that a run may name."""

import difflib
import sys
from collections.abc import Callable
from typing import Any

import optax

from jaxbnb import optim


def find_optimizer(name: str) -> Callable[..., optax.GradientTransformation]:
    """Returns the optimizer of a name: one of jaxbnb's, or "adamw" in float32.

    Raises:
        ValueError: there is no such optimizer.

    Example:
        >>> find_optimizer("adamw8bit").__name__
        'adamw8bit'
    """
    if name == "adamw":
        return _adamw
    # Muon learns matrices only, and here layers are stacked.
    known = [
        each
        for each in optim.__all__
        if each.endswith(("8bit", "4bit", "_fp8"))
        and not each.startswith(("scale_by", "trace", "muon", "paged_muon"))
    ]
    if name in known:
        return getattr(optim, name)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; perhaps {near[0]}" if near else ""
    raise ValueError(
        f"optimizer {name!r} is unknown{hint}. Known are {', '.join(known)} and adamw"
    )


def _adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 1e-4,
    mask: Any = None,
) -> optax.GradientTransformation:
    """AdamW with moments in float32.

    Those of ``optax.adamw`` have the dtype of the parameters. In bfloat16, the second
    moment never falls: a step of 1e-3 of itself is lost.
    """
    return optim.adamw8bit(
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        min_quantized_size=sys.maxsize,
    )
