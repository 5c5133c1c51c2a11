"""Whisper: an encoder of audio, and a decoder of its words."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_activation,
    read_size,
    refuse,
    require,
)


def _read_whisper(fields: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    require(fields, "vocab_size", "d_model", *sizes)
    layers, heads, inner = (fields[name] for name in sizes)
    refuse(
        fields,
        is_encoder_decoder=True,
        scale_embedding=False,
        decoder_attention_heads=heads,
        decoder_ffn_dim=inner,
    )
    decoder = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["d_model"],
        "intermediate_size": inner,
        "num_hidden_layers": read_size(fields, "decoder_layers", layers),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": divide(fields["d_model"], heads),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": read_size(fields, "max_target_positions", 448),
        "tie_word_embeddings": get(fields, "tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
        "model_type": "whisper",
        "norm": "layer",
        "activation": read_activation(fields, "activation_function", "gelu"),
        "gated_mlp": False,
        "positions": "learned",
    }
    return {
        "decoder": decoder,
        "num_encoder_layers": layers,
        "decoder_start_token_id": get(fields, "decoder_start_token_id", 50257),
        "pad_token_id": get(fields, "pad_token_id", 50256),
        "num_buckets": 0,
        "has_key_bias": False,
        "num_mel_bins": read_size(fields, "num_mel_bins", 80),
        "max_source_positions": read_size(fields, "max_source_positions", 1500),
    }


def _name_layers() -> dict[str, str]:
    names = {
        "model.embed_tokens": "model.decoder.embed_tokens",
        "model.embed_positions": "model.decoder.embed_positions",
        "model.stem.embed_positions": "model.encoder.embed_positions",
        "model.stem.conv1": "model.encoder.conv1",
        "model.stem.conv2": "model.encoder.conv2",
        "lm_head": "proj_out",
    }
    inside = {
        "input_layernorm": "self_attn_layer_norm",
        "cross_attention_layernorm": "encoder_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    }
    for ours, theirs in (("self_attn", "self_attn"), ("cross_attn", "encoder_attn")):
        inside |= {f"{ours}.{x}_proj": f"{theirs}.{x}_proj" for x in "qkv"}
        inside[f"{ours}.o_proj"] = f"{theirs}.out_proj"
    for side in ("encoder", "decoder"):
        names[f"model.{side}.norm"] = f"model.{side}.layer_norm"
        for ours, theirs in inside.items():
            layer = f"model.{side}.layers"
            names[f"{layer}.layer.{ours}"] = f"{layer}.{{}}.{theirs}"
    return names


WHISPER = Family(
    _read_whisper,
    names=_name_layers(),
    kind="encoder-decoder",
    head="proj_out",
)
