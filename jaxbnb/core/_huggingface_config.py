"""Translates between transformers' ``quantization_config`` and our QuantConfig."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from jaxbnb.core.formats import LLM_INT8

_METHOD: Final = "bitsandbytes"
_TYPES_4BIT: Final = ("nf4", "fp4")
_BLOCK_SIZE: Final = 64
# What transformers assumes for a field that a file does not have.
_DEFAULTS: Final[dict[str, Any]] = {
    "quant_method": _METHOD,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
}


def write(fields: Mapping[str, Any], skip: Sequence[str] | None) -> dict[str, Any]:
    """See `QuantConfig.to_huggingface`; ``fields`` are what `to_dict` returns."""
    values = dict(_DEFAULTS)
    values["llm_int8_skip_modules"] = None if skip is None else list(skip)
    quant_type, block_size = fields["quant_type"], fields["block_size"]
    if quant_type == LLM_INT8:
        return values | {
            "load_in_8bit": True,
            "llm_int8_threshold": fields["outlier_threshold"],
        }
    if quant_type not in _TYPES_4BIT or block_size != _BLOCK_SIZE:
        blocks = "" if block_size is None else f" in blocks of {block_size}"
        raise ValueError(
            f"transformers has bitsandbytes' {', '.join(_TYPES_4BIT)} in blocks of "
            f"{_BLOCK_SIZE}, and {LLM_INT8}; it cannot read {quant_type}{blocks}"
        )
    if fields["compute_dtype"] is not None:
        values["bnb_4bit_compute_dtype"] = fields["compute_dtype"]
    return values | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": fields["double_quant"],
    }


def read(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str] | None]:
    """Returns the fields of a QuantConfig, and the layers to skip."""
    values = _DEFAULTS | dict(config)
    if values["quant_method"] != _METHOD:
        raise NotImplementedError(
            f"this is quantised by {values['quant_method']!r}; jaxbnb reads {_METHOD!r}"
        )
    if values["llm_int8_has_fp16_weight"]:
        raise NotImplementedError(
            "llm_int8_has_fp16_weight keeps the weights in 16 bits; jaxbnb does not"
        )
    if values["load_in_4bit"] == values["load_in_8bit"]:
        raise ValueError(
            "one of load_in_4bit and load_in_8bit must be true; got "
            f"{values['load_in_4bit']} and {values['load_in_8bit']}"
        )
    skip = values["llm_int8_skip_modules"]
    if values["load_in_8bit"]:
        fields = {
            "quant_type": LLM_INT8,
            "outlier_threshold": values["llm_int8_threshold"],
        }
        return fields, skip
    if values["bnb_4bit_quant_type"] not in _TYPES_4BIT:
        raise ValueError(
            f"bnb_4bit_quant_type must be one of {list(_TYPES_4BIT)}; got "
            f"{values['bnb_4bit_quant_type']!r}"
        )
    fields = {
        "quant_type": values["bnb_4bit_quant_type"],
        "double_quant": values["bnb_4bit_use_double_quant"],
        "compute_dtype": values["bnb_4bit_compute_dtype"],
    }
    return fields, skip
