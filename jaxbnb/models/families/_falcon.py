"""Falcon: heads that share keys, attention and MLP in parallel, rope or ALiBi."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._bloom import BLOOM
from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_llama_like,
    read_rope,
    refuse,
    rename,
    require,
)


def _read_falcon(fields: Mapping[str, Any]) -> dict[str, Any]:
    fields = rename(fields, hidden_size="n_embed")
    require(fields, "hidden_size", "num_attention_heads")
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim, bias = divide(hidden, heads), get(fields, "bias", False)
    is_parallel = get(fields, "parallel_attn", True)
    if get(fields, "new_decoder_architecture", False):
        refuse(fields, parallel_attn=True)
        has_two = get(fields, "num_ln_in_parallel_attn", 2) == 2
        key_heads = get(fields, "num_kv_heads", heads)
    else:
        refuse(fields, num_ln_in_parallel_attn=1)
        has_two = False
        key_heads = 1 if get(fields, "multi_query", True) else heads
    if get(fields, "alibi", False):
        positions = {"positions": "scaled_alibi", "rope_theta": 10_000.0}
        positions["rope_scaling"] = None
    else:
        positions = read_rope(fields, head_dim)
    return read_llama_like(
        {**fields, "intermediate_size": get(fields, "ffn_hidden_size", 4 * hidden)},
        act=("activation", "gelu"),
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        rms_norm_eps=get(fields, "layer_norm_epsilon", 1e-5),
        tie_word_embeddings=get(fields, "tie_word_embeddings", True),
        attention_bias=bias,
        mlp_bias=bias,
        norm="layer",
        gated_mlp=False,
        parallel_residual=is_parallel,
        shared_norm=is_parallel and not has_two,
        **positions,
    )


def _vary(config: Any) -> Family:
    """Names the norms of Falcon 40B and 180B, which are two and in parallel."""
    return _TWO_NORMS if config.parallel_residual and not config.shared_norm else FALCON


FALCON = dataclasses.replace(
    BLOOM,
    read_config=_read_falcon,
    ignored=r".*\.(maybe_)?rotary(_emb)?\.inv_freq",
    vary=_vary,
)
_TWO_NORMS = dataclasses.replace(
    FALCON,
    names={
        **FALCON.names,
        "input_layernorm": "ln_attn",
        "post_attention_layernorm": "ln_mlp",
    },
)
