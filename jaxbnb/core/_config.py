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
        block_size: elements that share an absmax: 64. ``llm_int8`` has none.
        double_quant: quantise the absmax too; not for ``llm_int8``.
        compute_dtype: dtype of the product after dequantisation; None for the input's.
        outlier_threshold: of ``llm_int8`` alone: the magnitude from which on an input
            makes its column one of outliers, 6.0; 0 for no outliers.

    Raises:
        ValueError: unknown ``quant_type``, bad ``block_size``, ``outlier_threshold`` or
            ``double_quant``.
        TypeError: ``compute_dtype`` is not a floating dtype.

    Example:
        >>> import jaxbnb
        >>> jaxbnb.QuantConfig("nf4", double_quant=True)
        QuantConfig(quant_type='nf4', block_size=64, double_quant=True,
        compute_dtype=None, outlier_threshold=None)
        >>> jaxbnb.QuantConfig("llm_int8").outlier_threshold
        6.0
    """

    quant_type: str = "nf4"
    block_size: int | None = None
    double_quant: bool = False
    compute_dtype: jax.typing.DTypeLike | None = None
    outlier_threshold: float | None = None

    def __post_init__(self):
        _formats.codebook(self.quant_type)
        _formats.check_double_quant(self.quant_type, self.double_quant)
        chosen = {
            name: choose(self.quant_type, getattr(self, name))
            for name, choose in (
                ("block_size", _formats.choose_block_size),
                ("outlier_threshold", _formats.choose_outlier_threshold),
            )
        }
        if self.compute_dtype is not None:
            dtype = np.dtype(self.compute_dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"compute_dtype must be floating, got {dtype}")
            chosen["compute_dtype"] = dtype
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

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
