"""Which leaves hold 8-bit moments, and one step of a leaf of either kind."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbnb.core._formats import check_block_size
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit

# The codes of zero in the signed and the unsigned dynamic map.
_ZERO_CODE = {True: 127, False: 0}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which leaves are quantised, and in blocks of what size."""

    block_size: int
    min_quantized_size: int

    def __post_init__(self):
        check_block_size(self.block_size)
        if self.min_quantized_size < 0:
            raise ValueError(
                f"min_quantized_size must be at least 0; got {self.min_quantized_size}"
            )

    def quantizes(self, leaf: Any) -> bool:
        """Whether the moments of a parameter are held in 8 bits."""
        return leaf.ndim > 0 and math.prod(leaf.shape) >= max(
            self.min_quantized_size, 1
        )

    def init_codes(self, params: Any, *, signed: bool) -> Any:
        """The codes of a zero moment, or a float32 zero moment, of each parameter."""

        def leaf(p):
            if not jnp.issubdtype(p.dtype, jnp.floating):
                raise TypeError(
                    f"8-bit optimizers need floating parameters; got {p.dtype} of "
                    f"shape {p.shape}. Leave it out: optax.masked, optax.partition"
                )
            if self.quantizes(p):
                return jnp.full(p.shape, _ZERO_CODE[signed], jnp.uint8)
            return jnp.zeros(p.shape, jnp.float32)

        return jax.tree.map(leaf, params)

    def init_absmax(self, params: Any) -> Any:
        """A zero absmax a block; empty where the moment is float32."""

        def leaf(p):
            if self.quantizes(p):
                return jnp.zeros(absmax_shape(p.shape, self.block_size), jnp.float32)
            return jnp.zeros((0,) * max(p.ndim, 1), jnp.float32)

        return jax.tree.map(leaf, params)

    def update(
        self,
        rule: Rule,
        scalars: Any,
        grad: jax.Array,
        moments: Sequence[tuple[jax.Array, jax.Array, bool]],
    ) -> tuple[jax.Array, ...]:
        """One step of a leaf.

        Args:
            rule: what happens to an element.
            scalars: for the rule.
            grad: of any floating dtype.
            moments: ``(codes or float32 values, absmax, signed)`` of each.

        Returns:
            The update in the dtype of ``grad``, each moment, then each absmax.
        """
        if self.quantizes(grad):
            update, new = update_8bit(
                rule,
                scalars,
                grad,
                [Moment(*moment) for moment in moments],
                block_size=self.block_size,
            )
            return (update, *(m.codes for m in new), *(m.absmax for m in new))
        values = tuple(value for value, _, _ in moments)
        for value in values:
            if (value.shape, value.dtype) != (grad.shape, jnp.float32):
                raise ValueError(
                    f"a gradient of shape {grad.shape} has float32 moments of that "
                    f"shape; the state has {value.dtype} of shape {value.shape}. Was "
                    "it made for another parameter or block_size?"
                )
        update, kept = rule.apply(scalars, grad.astype(jnp.float32), values)
        return (update.astype(grad.dtype), *kept, *(absmax for _, absmax, _ in moments))


def map_leaves(fn: Callable[..., tuple], num_results: int, tree: Any, *rest: Any):
    """`jax.tree.map` of a function with several results: a tree for each."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in rest]
    results = [fn(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(
        treedef.unflatten([result[i] for result in results]) for i in range(num_results)
    )
