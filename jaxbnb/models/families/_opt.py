"""OPT: learned positions that start at the third row, LayerNorm, ReLU."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import divide, get, read_activation, refuse, require


def _read_opt(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(
        fields,
        "vocab_size",
        "hidden_size",
        "ffn_dim",
        "num_hidden_layers",
        "num_attention_heads",
    )
    # OPT-350m has norms after attention and MLP, and projects its embeddings.
    refuse(
        fields,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=fields["hidden_size"],
    )
    heads, bias = fields["num_attention_heads"], get(fields, "enable_bias", True)
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["ffn_dim"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": divide(fields["hidden_size"], heads),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": get(fields, "max_position_embeddings", 2048),
        "tie_word_embeddings": get(fields, "tie_word_embeddings", True),
        "attention_bias": bias,
        "mlp_bias": bias,
        "model_type": "opt",
        "norm": "layer",
        "activation": read_activation(fields, "activation_function", "relu"),
        "gated_mlp": False,
        "positions": "learned",
        "position_offset": 2,
    }


OPT = Family(
    _read_opt,
    layers="model.decoder.layers",
    names={
        "model.embed_tokens": "model.decoder.embed_tokens",
        "model.embed_positions": "model.decoder.embed_positions",
        "model.norm": "model.decoder.final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
    # The name in files of the decoder without its head.
    renamed={r"decoder\.": "model.decoder."},
)
