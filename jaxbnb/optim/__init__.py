"""Optimizers with low-bit state, as Optax transformations."""

from jaxbnb.optim._adam import (
    ScaleByAdam8bitState,
    adam8bit,
    adamw8bit,
    paged_adam8bit,
    paged_adamw8bit,
    scale_by_adam8bit,
)
from jaxbnb.optim._paged import paged

__all__ = [
    "ScaleByAdam8bitState",
    "adam8bit",
    "adamw8bit",
    "paged",
    "paged_adam8bit",
    "paged_adamw8bit",
    "scale_by_adam8bit",
]
