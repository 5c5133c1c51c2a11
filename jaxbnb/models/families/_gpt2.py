"""GPT-2: learned positions, LayerNorm, and kernels that are not transposed."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family, in_order, qkv_sizes
from jaxbnb.models.families._fields import divide, get, read_activation, refuse, require


def _read_gpt2(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "vocab_size", "n_embd", "n_layer", "n_head")
    refuse(
        fields,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["n_embd"],
        "intermediate_size": get(fields, "n_inner", 4 * fields["n_embd"]),
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": fields["n_head"],
        "num_key_value_heads": fields["n_head"],
        "head_dim": divide(fields["n_embd"], fields["n_head"]),
        "rms_norm_eps": get(fields, "layer_norm_epsilon", 1e-5),
        "max_position_embeddings": get(fields, "n_positions", 1024),
        "tie_word_embeddings": get(fields, "tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
        "model_type": "gpt2",
        "norm": "layer",
        "activation": read_activation(fields, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
    }


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
