"""The quantised operand as implementations see it: arrays, a codebook and ints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer, UInt8

from jaxbnb_kernels.quantize_blockwise import decode_scales, dequantize_absmax
from jaxbnb_kernels.quantize_blockwise.scales import ScaleType


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A matrix ``(rows, size)``, quantised in blocks along ``size``.

    Attributes:
        codes: ``(rows, size)``, or ``(rows, ceil(size / 2))`` if packed.
        absmax: ``(rows, blocks)``; float32, or uint8 if nested or of a ``scale_type``.
        nested: ``(nested_absmax, offset)`` of a doubly quantised matrix, or None.
        codebook: 16 or 256 levels, or None for linear int8.
        block_size: elements that share one absmax.
        size: elements of a row.
        zero_point: ``(rows, blocks)``, subtracted from the levels of each block; None
            for zeros.
        scale_type: 8-bit float that the absmax are stored as, or None.
        tensor_scale: ``(1,)``, see `decode_scales`, or None.
    """

    codes: Integer[Array, "rows stored"]
    absmax: Integer[Array, "rows blocks"] | Float32[Array, "rows blocks"]
    nested: tuple[Array, Array] | None
    codebook: np.ndarray | None
    block_size: int
    size: int
    zero_point: UInt8[Array, "rows blocks"] | None = None
    scale_type: ScaleType | None = None
    tensor_scale: Float32[Array, " 1"] | None = None

    def with_float_scales(self) -> "Weight":
        """Returns the same matrix without a ``scale_type``, its absmax in float32."""
        if self.scale_type is None:
            return self
        absmax = decode_scales(self.absmax, self.tensor_scale, self.scale_type)
        return dataclasses.replace(
            self, absmax=absmax, scale_type=None, tensor_scale=None
        )

    def float_absmax(self) -> Float32[Array, "rows blocks"]:
        """Returns the absmax in float32, decoded if it is nested."""
        if self.nested is None:
            return self.absmax.astype(jnp.float32)
        return dequantize_absmax(self.absmax, *self.nested)

    def tree_flatten(self):
        """Returns arrays as children; the codebook is static, as hashable bytes."""
        codebook = None if self.codebook is None else self.codebook.tobytes()
        children = (
            *(self.codes, self.absmax, self.nested),
            *(self.zero_point, self.tensor_scale),
        )
        return children, (codebook, self.block_size, self.size, self.scale_type)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Undoes `tree_flatten`."""
        codes, absmax, nested, zero_point, tensor_scale = children
        codebook, block_size, size, scale_type = aux
        levels = None if codebook is None else np.frombuffer(codebook, np.float32)
        return cls(
            *(codes, absmax, nested, levels, block_size, size),
            *(zero_point, scale_type, tensor_scale),
        )
