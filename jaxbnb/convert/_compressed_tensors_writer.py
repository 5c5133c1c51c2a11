"""Writes quantised kernels as the arrays that compressed-tensors stores.

vLLM and transformers load them. An integer or a float8 stands for itself times a scale,
where jaxbnb has levels of at most 1 times an absmax, so a scale is the absmax divided
by the largest integer or float8. Weights are ``(out, in)``, with groups along ``in``.

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


class Scheme(NamedTuple):
    """How compressed-tensors describes and stores one of jaxbnb's formats.

    Attributes:
        format: its name of the layout.
        type: "int" or "float".
        bits: size of a code in bits.
        largest: the integer or float8 that stands for the absmax.
        has_rounded_inputs: whether each row of the inputs is rounded to the same type.
    """

    format: str
    type: str
    bits: int
    largest: int
    has_rounded_inputs: bool

    @property
    def is_packed(self) -> bool:
        """Whether several codes share a word, and the weight's name tells so."""
        return self.format == "pack-quantized"


_SCHEMES: Final = {
    "int4": Scheme("pack-quantized", "int", 4, 7, False),
    "int8": Scheme("pack-quantized", "int", 8, 127, False),
    LLM_INT8: Scheme("int-quantized", "int", 8, 127, True),
}


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
        or scheme.has_rounded_inputs != rounds_inputs
    ):
        raise ValueError(
            f"compressed-tensors stores {', '.join(_SCHEMES)}, with absmax in float32, "
            "and fp8_e4m3 with the same act_quant_type; it cannot store "
            f"{config.quant_type} with double_quant={config.double_quant} and "
            f"act_quant_type={config.act_quant_type!r}"
        )
    if scheme.is_packed and (config.block_size or 0) % 8:
        raise ValueError(
            "compressed-tensors packs 8 codes of 4 bits into a word, so block_size "
            f"must be a multiple of 8; got {config.block_size}"
        )
    return scheme


def make_config(config: QuantConfig, skip: Sequence[str]) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a ``config.json``.

    Args:
        config: format of the linear layers.
        skip: modules that are not quantised.
    """
    scheme = find_scheme(config)
    common = {"num_bits": scheme.bits, "type": scheme.type, "symmetric": True}
    is_grouped = scheme.is_packed
    weights = common | {
        "strategy": "group" if is_grouped else "channel",
        "group_size": config.block_size if is_grouped else None,
        "dynamic": False,
    }
    inputs = common | {"strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.has_rounded_inputs else None,
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
    scale = TensorInfo((rows, blocks), np.dtype(np.float32))
    if not scheme.is_packed:
        dtype = np.dtype(np.int8) if scheme.type == "int" else _FLOAT8
        return {name: TensorInfo(info.shape, dtype), f"{name}_scale": scale}
    words = size * scheme.bits // 32
    return {
        f"{name}_packed": TensorInfo((rows, words), np.dtype(np.int32)),
        f"{name}_scale": scale,
        f"{name}_shape": TensorInfo((2,), np.dtype(np.int64)),
    }


def make_arrays(name: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    """Returns the arrays that `plan_arrays` announces, from a kernel ``(in, out)``."""
    check_parts(q)
    scheme = _SCHEMES[q.quant_type]
    codes, absmax = np.asarray(q.codes), np.asarray(q.absmax)
    scale = absmax / np.float32(scheme.largest)
    if not scheme.is_packed:
        stored = codes if scheme.type == "int" else codes.view(_FLOAT8)
        return {name: stored, f"{name}_scale": scale}
    if scheme.bits == 4:
        # Both have the integer -8 as the code 0.
        words = np.ascontiguousarray(swap_nibbles(codes)).view("<i4")
    else:
        words = pack_words(codes.view(np.uint8) ^ np.uint8(128), 8)
    return {
        f"{name}_packed": words,
        f"{name}_scale": scale,
        f"{name}_shape": np.asarray(q.shape[::-1], np.int64),
    }
