"""BLOOM: ALiBi instead of positions, and a norm after the embedding."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family, by_group
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_llama_like,
    refuse,
    rename,
    require,
)


def _read_bloom(fields: Mapping[str, Any]) -> dict[str, Any]:
    fields = rename(
        fields,
        hidden_size="n_embed",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
    )
    require(fields, "hidden_size", "num_attention_heads")
    refuse(fields, apply_residual_connection_post_layernorm=False, slow_but_exact=False)
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return read_llama_like(
        {**fields, "intermediate_size": 4 * hidden, "hidden_act": "gelu_new"},
        num_key_value_heads=heads,
        head_dim=divide(hidden, heads),
        rms_norm_eps=get(fields, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=get(fields, "seq_length", 2048),
        tie_word_embeddings=get(fields, "tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
        norm="layer",
        gated_mlp=False,
        embedding_norm=True,
        positions="alibi",
    )


BLOOM = Family(
    _read_bloom,
    prefix="transformer.",
    layers="transformer.h",
    names={
        "model.embed_tokens": "transformer.word_embeddings",
        "model.embed_norm": "transformer.word_embeddings_layernorm",
        "model.norm": "transformer.ln_f",
        **dict.fromkeys(QKV, "self_attention.query_key_value"),
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    fused=((QKV, by_group),),
)
