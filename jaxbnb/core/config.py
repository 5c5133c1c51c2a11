"""QuantConfig: how a layer quantises its weight."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb.core import _huggingface_config, formats
from jaxbnb.core._quantize import quantize
from jaxbnb.core._quantized_array import QuantizedArray


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """The format of a quantised weight and the dtype it is computed in.

    Attributes:
        quant_type: format, as in `jaxbnb.quantize`; not "dynamic8_unsigned".
        block_size: number of elements that share an absmax, by default the format's,
            64 for most. None for ``llm_int8`` and with an ``act_quant_type``, where a
            whole row shares one.
        double_quant: whether the absmax is quantised too; not for ``llm_int8``, or
            formats that store scales.
        compute_dtype: dtype of the product after dequantisation; None for the input's.
        outlier_threshold: only for ``llm_int8``: smallest magnitude of an outlier in
            the input, 6.0 by default; 0 for no outliers.
        act_quant_type: only for ``fp8_e4m3`` and ``fp8_e5m2``: one of these two, which
            each row of the input is rounded to, so that fp8 is multiplied by fp8. None
            to leave the input as it is.

    Raises:
        ValueError: ``quant_type`` is unknown or has no negative levels; or a bad
            ``block_size``, ``outlier_threshold``, ``double_quant`` or
            ``act_quant_type``.
        TypeError: ``compute_dtype`` is not a floating dtype.

    Example:
        >>> import jaxbnb
        >>> jaxbnb.QuantConfig("nf4", double_quant=True)
        QuantConfig(quant_type='nf4', block_size=64, double_quant=True,
        compute_dtype=None, outlier_threshold=None, act_quant_type=None)
        >>> jaxbnb.QuantConfig("llm_int8").outlier_threshold
        6.0
    """

    quant_type: str = "nf4"
    block_size: int | None = None
    double_quant: bool = False
    # Stored as an np.dtype, so that jnp.float32 and "float32" give equal configs.
    compute_dtype: jax.typing.DTypeLike | None = None
    outlier_threshold: float | None = None
    act_quant_type: str | None = None

    def __post_init__(self):
        formats.check_weight_format(self.quant_type)
        formats.check_double_quant(self.quant_type, self.double_quant)
        formats.check_act_quant_type(self.quant_type, self.act_quant_type)
        block_size = formats.choose_block_size(
            self.quant_type, self.block_size, self.act_quant_type
        )
        object.__setattr__(self, "block_size", block_size)
        threshold = formats.choose_outlier_threshold(
            self.quant_type, self.outlier_threshold
        )
        object.__setattr__(self, "outlier_threshold", threshold)
        if self.compute_dtype is not None:
            try:
                dtype = np.dtype(self.compute_dtype)
            except TypeError as error:
                raise TypeError(
                    f"compute_dtype must be a dtype, got {self.compute_dtype!r}"
                ) from error
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"compute_dtype must be floating, got {dtype}")
            object.__setattr__(self, "compute_dtype", dtype)

    def quantize_kernel(
        self, kernel: Float[Array, "*batch fan_in fan_out"]
    ) -> QuantizedArray:
        """Quantises the kernel of a dense layer along the axis that products sum over.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> jaxbnb.QuantConfig("int8").quantize_kernel(jnp.ones((128, 4))).axis
            -2
        """
        return self._quantize(kernel, axis=-2)

    def quantize_embedding(
        self, embedding: Float[Array, "*batch num_embeddings features"]
    ) -> QuantizedArray:
        """Quantises an embedding; each row has its own blocks.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> jaxbnb.QuantConfig("int8").quantize_embedding(jnp.ones((128, 64))).axis
            -1
        """
        return self._quantize(embedding, axis=-1)

    def _quantize(self, x: Float[Array, "*shape"], axis: int) -> QuantizedArray:
        block_size = self.block_size
        if self.act_quant_type is not None:
            block_size = formats.whole_axis_block_size(x.shape[axis])
        return quantize(
            x,
            self.quant_type,
            block_size=block_size,
            axis=axis,
            double_quant=self.double_quant,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values; `from_dict` is the inverse.

        Example:
            >>> import jaxbnb
            >>> jaxbnb.QuantConfig("fp4", compute_dtype="bfloat16").to_dict()
            {'quant_type': 'fp4', 'block_size': 64, 'double_quant': False,
             'compute_dtype': 'bfloat16', 'outlier_threshold': None,
             'act_quant_type': None}
        """
        fields = dataclasses.asdict(self)
        if self.compute_dtype is not None:
            fields["compute_dtype"] = np.dtype(self.compute_dtype).name
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "QuantConfig":
        """Makes a config from the fields of `to_dict`; missing ones get their defaults.

        Raises:
            ValueError: a field is unknown, or has a bad value.
            TypeError: ``compute_dtype`` is not a floating dtype.

        Example:
            >>> import json, jaxbnb
            >>> config = jaxbnb.QuantConfig("llm_int8", outlier_threshold=5.0)
            >>> text = json.dumps(config.to_dict())
            >>> jaxbnb.QuantConfig.from_dict(json.loads(text)) == config
            True
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in names]
        if unknown:
            raise ValueError(f"QuantConfig has no {unknown}; its fields are {names}")
        return cls(**fields)

    def to_huggingface(self, skip: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the ``quantization_config`` of a Hugging Face ``config.json``.

        Args:
            skip: names of layers that are not quantised; None for transformers'
                default, the output head.

        Returns:
            The fields that ``transformers.BitsAndBytesConfig`` writes and reads.

        Raises:
            ValueError: bitsandbytes lacks the format. It has nf4 and fp4 in blocks of
                64, and llm_int8.

        Example:
            >>> import jaxbnb
            >>> config = jaxbnb.QuantConfig("nf4").to_huggingface(skip=["lm_head"])
            >>> config["load_in_4bit"], config["bnb_4bit_quant_type"]
            (True, 'nf4')
            >>> config["llm_int8_skip_modules"]
            ['lm_head']
        """
        return _huggingface_config.write(self.to_dict(), skip)

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any]
    ) -> tuple["QuantConfig", list[str] | None]:
        """Reads a ``quantization_config``: the inverse of `to_huggingface`.

        Two fields are ignored, as they do not belong to the format:
        ``bnb_4bit_quant_storage`` is the dtype that a file stores the codes in, and
        ``llm_int8_enable_fp32_cpu_offload`` the place of the weights.

        Args:
            config: ``quantization_config`` of a ``config.json``.

        Returns:
            ``(config, skip)``, where ``skip`` is ``llm_int8_skip_modules``.

        Raises:
            NotImplementedError: it is of another method than bitsandbytes, or keeps
                weights in 16 bits.
            ValueError: it says neither or both of 4 and 8 bits, or has bad values.

        Example:
            >>> import jaxbnb
            >>> config, skip = jaxbnb.QuantConfig.from_huggingface(
            ...     {"quant_method": "bitsandbytes", "load_in_8bit": True})
            >>> config.quant_type, config.outlier_threshold, skip
            ('llm_int8', 6.0, None)
        """
        fields, skip = _huggingface_config.read(config)
        return cls(**fields), skip


def as_config(config: QuantConfig | str) -> QuantConfig:
    """Returns the config that a caller gave as a config or as the name of a format.

    Raises:
        TypeError: ``config`` is neither.
        ValueError: the format is unknown; the message lists all.

    Example:
        >>> as_config("int8") == QuantConfig("int8")
        True
    """
    if isinstance(config, QuantConfig):
        return config
    if isinstance(config, str):
        return QuantConfig(config)
    raise TypeError(
        "a format is a jaxbnb.QuantConfig, or a format's name such as 'nf4'; got "
        f"{type(config).__name__}"
    )
