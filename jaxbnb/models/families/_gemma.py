"""Gemma 2 and 3: norms on both sides, alternating windows, softened logits."""

import math
from collections.abc import Mapping
from typing import Any

from jaxbnb.models._rope import check_positive
from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    get,
    read_layer_types,
    read_llama_like,
    read_rope,
    read_size,
    refuse,
    require,
)


def _read_gemma2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read(
        fields,
        period=2,
        max_position_embeddings=get(fields, "max_position_embeddings", 8192),
        # If these are absent, they have a default. Null switches them off.
        attention_softcap=fields.get("attn_logit_softcapping", 50.0),
        logit_softcap=fields.get("final_logit_softcapping", 30.0),
    )


def _read_gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    parameters = get(fields, "rope_parameters", {})
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {parameters!r}")
    # transformers 5 has an object for each type of layer, 4 a scaling for one type.
    rope = parameters.get("full_attention", {}) or get(fields, "rope_scaling", {})
    local = parameters.get("sliding_attention", {}) or {}
    local_theta = get(fields, "rope_local_base_freq", 10_000.0)
    if not isinstance(local, Mapping):
        raise ValueError(f"sliding_attention must be an object, got {local!r}")
    refuse(local, rope_type="default")
    return _read(
        fields,
        period=read_size(fields, "sliding_window_pattern", 6),
        qk_norm=True,
        max_position_embeddings=get(fields, "max_position_embeddings", 131_072),
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        local_rope_theta=get(local, "rope_theta", local_theta),
        **read_rope(fields, get(fields, "head_dim", 256), theta=1_000_000.0, rope=rope),
    )


def _read_text_of_gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config of a gemma3 must be an object, got {text!r}")
    # Files leave out fields that have transformers' default.
    default = {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    # If the outer config has this field, it overrides the text model's.
    tie = fields.get("tie_word_embeddings")
    outer = {} if tie is None else {"tie_word_embeddings": tie}
    return _read_gemma3({**default, **text, **outer, "model_type": "gemma3"})


def _read(fields: Mapping[str, Any], period: int, **changes: Any) -> dict[str, Any]:
    """Reads what both have in common; every ``period``-th layer sees all tokens."""
    require(fields, "hidden_size", "num_hidden_layers")
    refuse(fields, use_bidirectional_attention=False)
    layers = range(fields["num_hidden_layers"])
    scalar = get(fields, "query_pre_attn_scalar", 256)
    check_positive("query_pre_attn_scalar", scalar)
    return read_llama_like(
        {"head_dim": 256, **fields},
        act=("hidden_activation", "gelu_pytorch_tanh"),
        norm="rms_plus_one",
        post_norms=True,
        attention_bias=get(fields, "attention_bias", False),
        attention_scale=scalar**-0.5,
        embedding_scale=math.sqrt(fields["hidden_size"]),
        tie_word_embeddings=get(fields, "tie_word_embeddings", True),
        sliding_window=fields.get("sliding_window", 4096),
        **read_layer_types(fields, [(i + 1) % period == 0 for i in layers]),
        **changes,
    )


GEMMA2 = Family(_read_gemma2)
GEMMA3_TEXT = Family(_read_gemma3)
# Only the text model is read, not the parts around it that process images.
GEMMA3 = Family(
    _read_text_of_gemma3,
    prefix="language_model.",
    layers="language_model.model.layers",
    names={
        "model.embed_tokens": "language_model.model.embed_tokens",
        "model.norm": "language_model.model.norm",
        "lm_head": "language_model.lm_head",
    },
    # The names that transformers 5 uses in memory.
    renamed={
        r"model\.language_model\.": "language_model.model.",
        r"lm_head\.": "language_model.lm_head.",
    },
    ignored=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)
