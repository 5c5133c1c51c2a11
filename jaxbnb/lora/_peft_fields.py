"""The fields of PEFT's LoraConfig that jaxbnb's LoraConfig does not have."""

from typing import Any, Final

# Fields that change what is computed, and the values that mean no change. Files with
# other values are refused rather than half understood.
PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "fan_in_fan_out": (False, None),
    "alora_invocation_tokens": (None,),
}
# Fields without effect on what is computed.
WITHOUT_EFFECT: Final = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("revision", "task_type", "runtime_config"),
    # For layers that models here do not have.
    *("megatron_config", "megatron_core", "qalora_group_size"),
    # How factors started, or how gradients are approximated.
    *("eva_config", "corda_config", "lora_ga_config", "velora_config"),
)
# Fields that have another form here.
_ELSEWHERE: Final = {
    "loftq_config": "give loftq_iter, and the format as quant of add_adapter",
    "fan_in_fan_out": "leave it out: add_adapter knows how a kernel is stored",
}


def advise(name: str, value: Any) -> str:
    """Says what to do about a field of PEFT's; empty if the field is unknown.

    Example:
        >>> advise("lora_bias", False)
        'leave it out: False is what it does'
        >>> advise("lora_bias", True)
        'lora_bias=True is not supported, only False is'
    """
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in WITHOUT_EFFECT:
        return "leave it out: it has no effect here"
    if name not in PLAIN:
        return ""
    # ``in`` would fail for arrays, which compare element by element.
    if any(type(value) is type(plain) and value == plain for plain in PLAIN[name]):
        return f"leave it out: {value!r} is what it does"
    return f"{name}={value!r:.100} is not supported, only {PLAIN[name][0]!r} is"
