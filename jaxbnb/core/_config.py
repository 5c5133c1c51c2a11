"""QuantConfig: how a layer quantises its weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb.core import _formats
from jaxbnb.core._quantized_array import QuantizedArray, quantize


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """The format of a quantised weight and the dtype it is computed in.

    Attributes:
        quant_type: as in `jaxbnb.quantize`.
        block_size: elements that share an absmax.
        double_quant: quantise the absmax too.
        compute_dtype: dtype of the product after dequantisation; None for the input's.

    Raises:
        ValueError: unknown ``quant_type`` or bad ``block_size``.
        TypeError: ``compute_dtype`` is not a floating dtype.

    Example:
        >>> import jaxbnb
        >>> jaxbnb.QuantConfig("nf4", double_quant=True)
        QuantConfig(quant_type='nf4', block_size=64, double_quant=True,
        compute_dtype=None)
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = False
    compute_dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        _formats.codebook(self.quant_type)
        _formats.check_block_size(self.block_size)
        if self.compute_dtype is not None:
            dtype = np.dtype(self.compute_dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"compute_dtype must be floating, got {dtype}")

    def quantize_kernel(
        self, kernel: Float[Array, "*batch fan_in fan_out"]
    ) -> QuantizedArray:
        """Quantises the kernel of a dense layer along the axis that products sum over.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> jaxbnb.QuantConfig("int8").quantize_kernel(jnp.ones((128, 4))).axis
            -2
        """
        return quantize(
            kernel,
            self.quant_type,
            block_size=self.block_size,
            axis=-2,
            double_quant=self.double_quant,
        )

    def quantize_embedding(
        self, embedding: Float[Array, "*batch num_embeddings features"]
    ) -> QuantizedArray:
        """Quantises the rows of an embedding, each in blocks of its own.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> jaxbnb.QuantConfig("int8").quantize_embedding(jnp.ones((128, 64))).axis
            -1
        """
        return quantize(
            embedding,
            self.quant_type,
            block_size=self.block_size,
            axis=-1,
            double_quant=self.double_quant,
        )
