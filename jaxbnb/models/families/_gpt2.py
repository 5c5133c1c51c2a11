"""GPT-2: learned positions, LayerNorm, and kernels that are not transposed."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family, in_order, qkv_sizes
from jaxbnb.models.families._fields import read_gpt2_like, refuse


def _read_gpt2(fields: Mapping[str, Any]) -> dict[str, Any]:
    refuse(
        fields,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return read_gpt2_like(fields)


GPT2 = Family(
    _read_gpt2,
    prefix="transformer.",
    layers="transformer.h",
    names={
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        **dict.fromkeys(QKV, "attn.c_attn"),
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    fused=((QKV, lambda config: in_order(*qkv_sizes(config))),),
    # Older files hold the causal mask.
    ignored=r".*\.attn\.(masked_)?bias",
    transposed=False,
)
