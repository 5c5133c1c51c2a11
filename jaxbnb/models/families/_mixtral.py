"""Mixtral: a Mistral with several MLPs in each layer; each token uses two."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_llama_like,
    read_rope,
    require,
)


def _read_mixtral(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "hidden_size", "num_attention_heads")
    heads = fields["num_attention_heads"]
    head_dim = get(fields, "head_dim", None) or divide(fields["hidden_size"], heads)
    return read_llama_like(
        fields,
        rms_norm_eps=get(fields, "rms_norm_eps", 1e-5),
        max_position_embeddings=get(fields, "max_position_embeddings", 131_072),
        sliding_window=fields.get("sliding_window"),
        num_experts=get(fields, "num_local_experts", 8),
        num_experts_per_tok=get(fields, "num_experts_per_tok", 2),
        **read_rope(fields, head_dim, theta=1_000_000.0),
    )


MIXTRAL = Family(
    _read_mixtral,
    names={
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.layer.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.layer.up_proj": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.layer.down_proj": "block_sparse_moe.experts.{}.w2",
    },
)
