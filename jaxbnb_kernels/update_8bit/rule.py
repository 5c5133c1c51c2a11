"""What an optimizer does to one element: the part of a step that knows no storage."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

Values = tuple[Float32[Array, "*shape"], ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A step as two elementwise functions of float32 arrays.

    Two, so that the direction is computed from the very moments that are stored: an
    implementation may then write those before it reads the next, in place.

    Attributes:
        advance: ``advance(scalars, grad, moments) -> moments``.
        direction: ``direction(scalars, grad, moments) -> update``, of the new moments.
    """

    advance: Callable[[Any, Float32[Array, "*shape"], Values], Values]
    direction: Callable[
        [Any, Float32[Array, "*shape"], Values], Float32[Array, "*shape"]
    ]

    def apply(
        self, scalars: Any, grad: Float32[Array, "*shape"], old: Values
    ) -> tuple[Float32[Array, "*shape"], Values]:
        """The update, and the moments to store.

        Where the square of the gradient is not finite the update is NaN, and there, and
        wherever else a moment comes out non-finite, it keeps its old value.
        """
        new = self.advance(scalars, grad, old)
        poison = 0.0 * (grad * grad)
        kept = tuple(
            jnp.where(jnp.isfinite(n + poison), n, o)
            for n, o in zip(new, old, strict=True)
        )
        return self.direction(scalars, grad, kept) + poison, kept
