"""The quantised operand as implementations see it: arrays, a codebook and ints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from jaxbnb_kernels.quantize_blockwise import dequantize_absmax


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A matrix ``(rows, size)``, quantised in blocks along ``size``.

    Attributes:
        codes: ``(rows, size)``, or ``(rows, ceil(size / 2))`` if packed.
        absmax: ``(rows, blocks)``; float32, or uint8 if nested.
        nested: ``(nested_absmax, offset)`` of a doubly quantised matrix, or None.
        codebook: 16 or 256 levels, or None for linear int8.
        block_size: elements that share one absmax.
        size: elements of a row.
    """

    codes: Integer[Array, "rows stored"]
    absmax: Integer[Array, "rows blocks"] | Float32[Array, "rows blocks"]
    nested: tuple[Array, Array] | None
    codebook: np.ndarray | None
    block_size: int
    size: int

    def float_absmax(self) -> Float32[Array, "rows blocks"]:
        """Returns the absmax in float32, decoded if it is nested."""
        if self.nested is None:
            return self.absmax.astype(jnp.float32)
        return dequantize_absmax(self.absmax, *self.nested)

    def tree_flatten(self):
        """Returns arrays as children; the codebook is static, as hashable bytes."""
        codebook = None if self.codebook is None else self.codebook.tobytes()
        children = (self.codes, self.absmax, self.nested)
        return children, (codebook, self.block_size, self.size)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Undoes `tree_flatten`."""
        (codes, absmax, nested), (codebook, block_size, size) = children, aux
        levels = None if codebook is None else np.frombuffer(codebook, np.float32)
        return cls(codes, absmax, nested, levels, block_size, size)
