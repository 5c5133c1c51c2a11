"""gpt-oss: experts with biases, sinks of attention, every other layer with a window."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxbnb.models.families._family import Family, Sizes
from jaxbnb.models.families._fields import (
    get,
    read_layer_types,
    read_llama_like,
    read_rope,
    require,
)


def _read_gpt_oss(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "num_hidden_layers")
    head_dim = get(fields, "head_dim", 64)
    rope = {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    has_rope = fields.get("rope_scaling") or fields.get("rope_parameters")
    is_full = [layer % 2 == 1 for layer in range(fields["num_hidden_layers"])]
    return read_llama_like(
        {"head_dim": 64, **fields},
        attention_bias=get(fields, "attention_bias", True),
        mlp_bias=True,
        router_bias=True,
        attention_sinks=True,
        swiglu_limit=get(fields, "swiglu_limit", 7.0),
        swiglu_alpha=get(fields, "swiglu_alpha", 1.702),
        rms_norm_eps=get(fields, "rms_norm_eps", 1e-5),
        max_position_embeddings=get(fields, "max_position_embeddings", 131_072),
        num_experts=get(fields, "num_local_experts", get(fields, "num_experts", 128)),
        num_experts_per_tok=get(
            fields, "num_experts_per_tok", get(fields, "experts_per_token", 4)
        ),
        sliding_window=fields.get("sliding_window", 128),
        **read_layer_types(fields, is_full),
        **read_rope(fields, head_dim, theta=150_000.0, rope=None if has_rope else rope),
    )


def _interleave(config: Sizes) -> list[Int[np.ndarray, " rows"]]:
    """Rows of the gate and of the other factor take turns."""
    rows = np.arange(2 * config.intermediate_size)
    return [rows[::2], rows[1::2]]


_GATE_UP = ("mlp.experts.layer.gate_proj", "mlp.experts.layer.up_proj")
GPT_OSS = Family(
    _read_gpt_oss,
    names={
        "mlp.gate": "mlp.router",
        "mlp.experts.layer.gate_proj": "mlp.experts.gate_up_proj",
        "mlp.experts.layer.up_proj": "mlp.experts.gate_up_proj",
        "mlp.experts.layer.down_proj": "mlp.experts.down_proj",
    },
    fused=((_GATE_UP, _interleave),),
    stacked_experts=True,
)
