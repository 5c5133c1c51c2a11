"""Writes quantised kernels as the arrays that compressed-tensors stores.

vLLM and transformers load them. Weights are ``(out, in)``, with blocks along ``in``. A
code stands for a number times a scale. Where jaxbnb has levels of at most 1 times an
absmax, a scale is the absmax divided by the largest number.

References:
    https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.convert._packing import pack_words, swap_nibbles
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.parts import check_parts

_FLOAT8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT32, _UINT8 = np.dtype(np.float32), np.dtype(np.uint8)


class Scheme(NamedTuple):
    """How compressed-tensors describes and stores one of jaxbnb's formats.

    Attributes:
        format: its name of the layout.
        type: "int" or "float".
        bits: size of a code in bits.
        largest: number that stands for the absmax; 1 if the format has scales.
        rounds_inputs: whether each row of the inputs is rounded to the same type.
        has_zero_point: whether a block has a zero point.
        scale_dtype: dtype of the scales.
    """

    format: str
    type: str
    bits: int
    largest: int = 1
    rounds_inputs: bool = False
    has_zero_point: bool = False
    scale_dtype: np.dtype = _FLOAT32

    @property
    def is_grouped(self) -> bool:
        """Whether a row has several scales. Then the weight's name ends in _packed."""
        return "pack" in self.format


_PACKED: Final = "pack-quantized"
_SCHEMES: Final = {
    "int4": Scheme(_PACKED, "int", 4, 7),
    "int8": Scheme(_PACKED, "int", 8, 127),
    "int4_scaled": Scheme(_PACKED, "int", 4),
    "int8_scaled": Scheme(_PACKED, "int", 8),
    "uint4": Scheme(_PACKED, "int", 4, has_zero_point=True),
    "uint8": Scheme(_PACKED, "int", 8, has_zero_point=True),
    LLM_INT8: Scheme("int-quantized", "int", 8, 127, rounds_inputs=True),
    "fp8_e4m3": Scheme("float-quantized", "float", 8, 448, rounds_inputs=True),
    "mxfp4": Scheme("mxfp4-pack-quantized", "float", 4, scale_dtype=_UINT8),
    "nvfp4": Scheme("nvfp4-pack-quantized", "float", 4, scale_dtype=_FLOAT8),
}
QUANT_TYPES: Final = tuple(_SCHEMES)


def find_scheme(config: QuantConfig) -> Scheme:
    """Returns how a format is stored.

    Raises:
        ValueError: compressed-tensors has no such format.
    """
    scheme = _SCHEMES.get(config.quant_type)
    rounds_inputs = config.quant_type == LLM_INT8 or config.act_quant_type is not None
    if (
        scheme is None
        or config.double_quant
        or config.act_quant_type not in (None, config.quant_type)
        or scheme.rounds_inputs != rounds_inputs
    ):
        raise ValueError(
            f"compressed-tensors cannot store {_describe(config)}. It has "
            f"{', '.join(_SCHEMES)}, not doubly quantised; of these, only fp8_e4m3 "
            "rounds inputs, and always does"
        )
    if scheme.is_grouped and (config.block_size or 0) % 8:
        raise ValueError(
            "compressed-tensors packs 8 codes of 4 bits into a word, so block_size "
            f"must be a multiple of 8; got {config.block_size}"
        )
    return scheme


def _describe(config: QuantConfig) -> str:
    text = config.quant_type
    if config.double_quant:
        text += ", doubly quantised"
    if config.act_quant_type is not None:
        text += f", with inputs rounded to {config.act_quant_type}"
    return text


def make_config(config: QuantConfig, skip: Sequence[str]) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a ``config.json``.

    Args:
        config: format of the linear layers.
        skip: modules that are not quantised.
    """
    scheme = find_scheme(config)
    common = {"num_bits": scheme.bits, "type": scheme.type}
    weights = common | {
        "symmetric": not scheme.has_zero_point,
        "strategy": "group" if scheme.is_grouped else "channel",
        "group_size": config.block_size if scheme.is_grouped else None,
        "dynamic": False,
    }
    if scheme.scale_dtype != _FLOAT32:
        weights["scale_dtype"] = f"torch.{scheme.scale_dtype.name}"
    if config.quant_type == "nvfp4":
        weights["strategy"] = "tensor_group"
    inputs = common | {"symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.rounds_inputs else None,
        "output_activations": None,
        "format": scheme.format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(skip),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def plan_arrays(
    name: str, info: TensorInfo, config: QuantConfig
) -> dict[str, TensorInfo]:
    """Returns the arrays of a weight ``(out, in)`` quantised to ``config``."""
    scheme, (rows, size) = find_scheme(config), info.shape
    blocks = size // config.block_size if config.block_size else 1
    scale = TensorInfo((rows, blocks), scheme.scale_dtype)
    if not scheme.is_grouped:
        dtype = np.dtype(np.int8) if scheme.type == "int" else _FLOAT8
        return {name: TensorInfo(info.shape, dtype), f"{name}_scale": scale}
    int32, per_word = np.dtype(np.int32), 32 // scheme.bits
    if scheme.type == "float":
        infos = {f"{name}_packed": TensorInfo((rows, size // 2), _UINT8)}
        if config.quant_type == "nvfp4":
            infos[f"{name}_global_scale"] = TensorInfo((1,), _FLOAT32)
        return {**infos, f"{name}_scale": scale}
    infos = {f"{name}_packed": TensorInfo((rows, size // per_word), int32)}
    if scheme.has_zero_point:
        words = -(-rows // per_word)
        infos[f"{name}_zero_point"] = TensorInfo((words, blocks), int32)
    shape = TensorInfo((2,), np.dtype(np.int64))
    return {**infos, f"{name}_scale": scale, f"{name}_shape": shape}


def make_arrays(name: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    """Returns the arrays that `plan_arrays` announces, from a kernel ``(in, out)``."""
    check_parts(q)
    scheme = _SCHEMES[q.quant_type]
    codes, scale = np.asarray(q.codes), np.asarray(q.absmax)
    if scheme.scale_dtype == _FLOAT32:
        scale = scale / np.float32(scheme.largest)
    arrays = {f"{name}_scale": scale.view(scheme.scale_dtype)}
    if not scheme.is_grouped:
        arrays[name] = codes if scheme.type == "int" else codes.view(_FLOAT8)
        return arrays
    if scheme.bits == 4:
        # The same codes as jaxbnb's, but the first one of a byte in the low nibble.
        codes = np.ascontiguousarray(swap_nibbles(codes))
    if scheme.type == "float":
        if q.nested_absmax is not None:
            arrays[f"{name}_global_scale"] = np.asarray(q.nested_absmax)
        return {**arrays, f"{name}_packed": codes}
    # int8 is signed, and all other codes count from the lowest integer.
    codes = codes.view(np.uint8) ^ np.uint8(128) if q.quant_type == "int8" else codes
    arrays[f"{name}_packed"] = codes.view("<i4").astype(np.int32, copy=False)
    arrays[f"{name}_shape"] = np.asarray(q.shape[::-1], np.int64)
    if q.zero_point is not None:
        zero = pack_words(np.ascontiguousarray(np.asarray(q.zero_point).T), scheme.bits)
        arrays[f"{name}_zero_point"] = zero.T
    return arrays
