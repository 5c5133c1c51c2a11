"""GPT-NeoX and Pythia: parallel residual, and rope on a part of each head."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family, by_group
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_llama_like,
    read_rope,
    require,
)


def _read_gpt_neox(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "hidden_size", "num_attention_heads")
    head_dim = divide(fields["hidden_size"], fields["num_attention_heads"])
    bias = get(fields, "attention_bias", True)
    rope = read_rope(
        fields,
        head_dim,
        theta=get(fields, "rotary_emb_base", 10_000.0),
        part=get(fields, "rotary_pct", 0.25),
    )
    return read_llama_like(
        fields,
        rms_norm_eps=get(fields, "layer_norm_eps", 1e-5),
        act=("hidden_act", "gelu"),
        attention_bias=bias,
        mlp_bias=True,
        norm="layer",
        gated_mlp=False,
        parallel_residual=get(fields, "use_parallel_residual", True),
        **rope,
    )


GPT_NEOX = Family(
    _read_gpt_neox,
    prefix="gpt_neox.",
    layers="gpt_neox.layers",
    names={
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        **dict.fromkeys(QKV, "attention.query_key_value"),
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    fused=((QKV, by_group),),
    # The name in transformers 5.
    renamed={r"lm_head\.": "embed_out."},
    # Older files hold the causal mask and the frequencies of rope.
    ignored=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
