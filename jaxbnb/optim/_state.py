"""Which leaves hold 8-bit moments, and one step of a leaf of either kind."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbnb.core._formats import check_block_size
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit

# The codes of zero in the signed and the unsigned dynamic map, and of one in both.
_ZERO_CODE = {True: 127, False: 0}
_ONE_CODE = 255


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which leaves are quantised, and in blocks of what size."""

    block_size: int = 256
    min_quantized_size: int = 4096

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

    def init(
        self, params: Any, signed: bool, initial: jax.typing.ArrayLike = 0.0
    ) -> tuple[Any, Any]:
        """A moment of each parameter: trees of its codes and of its absmax.

        Or of its float32 values and of empty arrays, where it is not quantised.

        Args:
            params: arrays or ``jax.ShapeDtypeStruct``.
            signed: of which map the codes are.
            initial: the value of every element.
        """

        def leaf(p):
            if not jnp.issubdtype(p.dtype, jnp.floating):
                raise TypeError(
                    f"8-bit optimizers need floating parameters; got {p.dtype} of "
                    f"shape {p.shape}. Leave it out: optax.masked, optax.partition"
                )
            value = jnp.asarray(initial, jnp.float32)
            if not self.quantizes(p):
                empty = jnp.zeros((0,) * max(p.ndim, 1), jnp.float32)
                return jnp.full(p.shape, value), empty
            code = jnp.where(value > 0, _ONE_CODE, _ZERO_CODE[signed])
            absmax = jnp.full(absmax_shape(p.shape, self.block_size), value)
            return jnp.full(p.shape, code.astype(jnp.uint8)), absmax

        codes, absmax = map_leaves(leaf, 2, params)
        return codes, absmax

    def update(
        self,
        rule: Rule,
        scalars: Any,
        grad: jax.Array,
        moments: Sequence[tuple[jax.Array, jax.Array, bool]],
        param: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """One step of a leaf.

        Args:
            rule: what happens to an element.
            scalars: for the rule.
            grad: of any floating dtype.
            moments: ``(codes or float32 values, absmax, signed)`` of each.
            param: the parameter, for a step that writes it.

        Returns:
            The update in the dtype of ``grad``, or the new parameter in its own; each
            moment; then each absmax.
        """
        if self.quantizes(grad):
            update, new = update_8bit(
                rule,
                scalars,
                grad,
                [Moment(*moment) for moment in moments],
                param,
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
        grad32 = grad.astype(jnp.float32)
        if param is None:
            result, kept = rule.apply(scalars, grad32, values)
        else:
            param32 = param.astype(jnp.float32)
            result, kept = rule.apply_to(scalars, grad32, values, param32)
        dtype = (grad if param is None else param).dtype
        return (result.astype(dtype), *kept, *(absmax for _, absmax, _ in moments))


def map_leaves(fn: Callable[..., tuple], num_results: int, tree: Any, *rest: Any):
    """`jax.tree.map` of a function with several results: a tree for each."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in rest]
    results = [fn(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(
        treedef.unflatten([result[i] for result in results]) for i in range(num_results)
    )
