"""What an optimizer does to one element, independently of how moments are stored."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

Value = Float32[Array, "*shape"]
Values = tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A step as elementwise functions of float32 arrays.

    ``direction`` is separate, so that it uses exactly the moments that are stored. An
    implementation may then write these, in place, before it reads the next ones.

    Attributes:
        advance: ``advance(scalars, grad, old) -> new`` moments.
        direction: ``direction(scalars, grad, old, new) -> update``.
        finish: ``finish(scalars, update, param) -> update``, e.g. decay and learning
            rate; used only in a step that also writes the parameter.
    """

    advance: Callable[[Any, Value, Values], Values]
    direction: Callable[[Any, Value, Values, Values], Value]
    finish: Callable[[Any, Value, Value], Value] | None = None

    def apply(self, scalars: Any, grad: Value, old: Values) -> tuple[Value, Values]:
        """Returns the update, and the moments to store.

        Where the square of the gradient is not finite, the update is NaN. There, and
        wherever else a new moment is not finite, the moment keeps its old value.
        """
        new = self.advance(scalars, grad, old)
        poison = 0.0 * (grad * grad)
        kept = tuple(
            jnp.where(jnp.isfinite(n + poison), n, o)
            for n, o in zip(new, old, strict=True)
        )
        return self.direction(scalars, grad, old, kept) + poison, kept

    def apply_to(
        self, scalars: Any, grad: Value, old: Values, param: Value
    ) -> tuple[Value, Values]:
        """Returns the new parameter instead of the update, and the moments to store."""
        update, kept = self.apply(scalars, grad, old)
        if self.finish is not None:
            update = self.finish(scalars, update, param)
        return param + update, kept
