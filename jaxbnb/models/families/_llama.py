"""Llama and its near relatives: Mistral, Qwen 2 and 3, SmolLM 3."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_layer_types,
    read_llama_like,
    read_rope,
    read_size,
    require,
)


def _read_llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_llama_like(
        fields,
        attention_bias=get(fields, "attention_bias", False),
        mlp_bias=get(fields, "mlp_bias", False),
    )


def _read_mistral(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Null means no window. If it is absent, it has a default.
    return read_llama_like(fields, sliding_window=fields.get("sliding_window", 4096))


def _read_qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_llama_like(
        fields,
        attention_bias=True,
        output_bias=False,
        max_position_embeddings=get(fields, "max_position_embeddings", 32768),
        **_qwen_window(fields),
    )


def _read_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_llama_like(
        {"head_dim": 128, **fields},
        attention_bias=get(fields, "attention_bias", False),
        qk_norm=True,
        max_position_embeddings=get(fields, "max_position_embeddings", 32768),
        **_qwen_window(fields),
    )


def _qwen_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "num_hidden_layers")
    if not get(fields, "use_sliding_window", False):
        return {}
    first = get(fields, "max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"max_window_layers must be an int, got {first!r}")
    is_full = [layer < first for layer in range(fields["num_hidden_layers"])]
    return {
        "sliding_window": fields.get("sliding_window", 4096),
        **read_layer_types(fields, is_full),
    }


def _read_smollm3(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "num_hidden_layers", "num_attention_heads", "hidden_size")
    layers = range(fields["num_hidden_layers"])
    interval = read_size(fields, "no_rope_layer_interval", 4)
    has_rope = fields.get("no_rope_layers")
    if has_rope is None:
        has_rope = [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(has_rope, list) or len(has_rope) != len(layers):
        raise ValueError(
            f"no_rope_layers must be a list of {len(layers)}, got {has_rope!r}"
        )
    window = {}
    if get(fields, "use_sliding_window", False):
        is_full = [bool(has_rope[layer]) for layer in layers]
        window = {
            "sliding_window": fields.get("sliding_window"),
            **read_layer_types(fields, is_full),
        }
    heads = fields["num_attention_heads"]
    head_dim = get(fields, "head_dim", divide(fields["hidden_size"], heads))
    return read_llama_like(
        fields,
        attention_bias=get(fields, "attention_bias", False),
        mlp_bias=get(fields, "mlp_bias", False),
        tie_word_embeddings=get(fields, "tie_word_embeddings", True),
        max_position_embeddings=get(fields, "max_position_embeddings", 32768),
        layers_without_rope=tuple(i for i in layers if not has_rope[i]),
        **window,
        **read_rope(fields, head_dim, theta=2_000_000.0),
    )


LLAMA = Family(_read_llama)
MISTRAL = Family(_read_mistral)
QWEN2 = Family(_read_qwen2)
QWEN3 = Family(_read_qwen3)
SMOLLM3 = Family(_read_smollm3)
