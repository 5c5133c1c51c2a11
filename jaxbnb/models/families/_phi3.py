"""Phi-3: a Llama with q, k and v in one tensor, and gate and up in another."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import GATE_UP, QKV, Family, in_order, qkv_sizes
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_llama_like,
    read_rope,
    refuse,
    require,
)


def _read_phi3(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "hidden_size", "num_attention_heads")
    head_dim = divide(fields["hidden_size"], fields["num_attention_heads"])
    refuse(fields, attention_bias=False)
    return read_llama_like(
        fields,
        rms_norm_eps=get(fields, "rms_norm_eps", 1e-5),
        max_position_embeddings=get(fields, "max_position_embeddings", 4096),
        sliding_window=fields.get("sliding_window"),
        **read_rope(fields, head_dim, part=1.0),
    )


PHI3 = Family(
    _read_phi3,
    names={
        **dict.fromkeys(QKV, "self_attn.qkv_proj"),
        **dict.fromkeys(GATE_UP, "mlp.gate_up_proj"),
    },
    fused=(
        (QKV, lambda config: in_order(*qkv_sizes(config))),
        (GATE_UP, lambda config: in_order(*[config.intermediate_size] * 2)),
    ),
)
