"""Optimizers: a low-bit transformation, decay and learning rate in a chain."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxbnb.optim._fused import update_and_apply
from jaxbnb.optim._low_bit import LowBit, as_float32

MaskOrFn = Any | Callable[[optax.Params], Any] | None


@dataclasses.dataclass(frozen=True)
class Alias:
    """``init`` and ``update`` of a chain such as ``optax.adamw``, and ``fused_step``.

    Attributes:
        scale: the first of the chain.
        learning_rate: a fixed value or a schedule.
        weight_decay: a fixed value or a schedule; None for no decay in the chain.
        mask: which parameters decay.
    """

    scale: optax.GradientTransformation
    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule | None = None
    mask: MaskOrFn = None

    @functools.cached_property
    def chain(self) -> optax.GradientTransformationExtraArgs:
        decay = []
        if self.weight_decay is not None:
            decay = [optax.add_decayed_weights(self.weight_decay, self.mask)]
        rate = optax.scale_by_learning_rate(self.learning_rate)
        return optax.chain(self.scale, *decay, rate)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def init(self, params: optax.Params) -> Any:
        return self.chain.init(params)

    def update(self, updates, state, params=None, **extra_args):
        return self.chain.update(updates, state, params, **extra_args)

    def fused_step(self, grads: optax.Updates, state: Any, params: optax.Params):
        """``(params, state)``; of a float32 parameter the same as by ``update``."""
        low_bit = getattr(self.scale.update, "__self__", None)
        if not isinstance(low_bit, LowBit):
            return update_and_apply(self.transformation(), grads, state, params)
        first, *rest = tuple(state)
        scalars: dict[str, Any] = {"learning_rate": self._rate(rest[-1])}
        decay = None
        if self.weight_decay is not None:
            decay = self._decay(rest[0], params)
        new_params, first = low_bit.step(
            _finish, as_float32(**scalars), decay, grads, first, params
        )
        # The counts of schedules; what else is computed here nobody reads.
        after: Any = self.chain.update(grads, state, params)[1]
        return new_params, (first, *after[1:])

    def _rate(self, state) -> jax.typing.ArrayLike:
        if callable(self.learning_rate):
            return self.learning_rate(state.count)
        return self.learning_rate

    def _decay(self, state, params) -> Any:
        """A scalar for each parameter."""
        value = self.weight_decay
        if callable(value):
            state = getattr(state, "inner_state", state)
            value = value(state.count)
        value = 0.0 if value is None else value
        mask = self.mask(params) if callable(self.mask) else self.mask
        if mask is None:
            mask = True

        def leaf(decays, subtree):
            scalar = as_float32(x=value if decays else 0.0)["x"]
            return jax.tree.map(lambda _: scalar, subtree)

        return jax.tree.map(leaf, mask, params)


def _finish(scalars, update, param):
    if "weight_decay" in scalars:
        update = update + scalars["weight_decay"] * param
    return -scalars["learning_rate"] * update
