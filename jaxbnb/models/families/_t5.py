"""T5, Flan-T5 and mT5: encoder-decoders with relative positions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import (
    divide,
    get,
    read_activation,
    read_size,
    refuse,
    require,
)

# Relative positions have no largest one.
_UNLIMITED: Final = 2**31 - 1


def _read_t5(fields: Mapping[str, Any]) -> dict[str, Any]:
    tie = get(fields, "tie_word_embeddings", True)
    values = _read(fields, act="relu", tie=tie)
    # transformers 4 scales if it ties. 5 writes it, and always says that it ties.
    values["scales_head"] = get(fields, "scale_decoder_outputs", tie)
    return values


def _read_mt5(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read(
        fields, act="gated-gelu", tie=get(fields, "tie_word_embeddings", False)
    )


def _read(fields: Mapping[str, Any], *, act: str, tie: bool) -> dict[str, Any]:
    require(fields, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads")
    refuse(fields, is_encoder_decoder=True, is_decoder=False)
    name = "feed_forward_proj"
    act = get(fields, name, act)
    gate, _, kind = act.rpartition("-") if isinstance(act, str) else ("", "", act)
    if gate not in ("", "gated"):
        raise NotImplementedError(
            f"{name} {act!r} is not implemented; jaxbnb has an activation such as "
            "'relu', or 'gated-' and an activation"
        )
    # transformers reads it so.
    kind = "gelu_new" if act == "gated-gelu" else kind
    layers, heads = fields["num_layers"], fields["num_heads"]
    head_dim = fields.get("d_kv")
    head_dim = divide(fields["d_model"], heads) if head_dim is None else head_dim
    decoder = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["d_model"],
        "intermediate_size": fields["d_ff"],
        "num_hidden_layers": read_size(fields, "num_decoder_layers", layers),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "rms_norm_eps": get(fields, "layer_norm_epsilon", 1e-6),
        "max_position_embeddings": _UNLIMITED,
        "tie_word_embeddings": tie,
        "model_type": fields["model_type"],
        "attention_scale": 1.0,
        "activation": read_activation({name: kind}, name, "relu"),
        "gated_mlp": gate == "gated",
    }
    return {
        "decoder": decoder,
        "num_encoder_layers": layers,
        "decoder_start_token_id": get(fields, "decoder_start_token_id", 0),
        "pad_token_id": get(fields, "pad_token_id", 0),
        "num_buckets": read_size(fields, "relative_attention_num_buckets", 32),
        "max_distance": read_size(fields, "relative_attention_max_distance", 128),
    }


def _name_layers() -> dict[str, str]:
    names = {
        "model.embed_tokens": "shared",
        "model.encoder.norm": "encoder.final_layer_norm",
        "model.decoder.norm": "decoder.final_layer_norm",
    }
    # Each sublayer: its number in the encoder and in the decoder, its name, its norm.
    for numbers, ours, theirs, norm in (
        ((0, 0), "self_attn", "SelfAttention", "input_layernorm"),
        ((None, 1), "cross_attn", "EncDecAttention", "cross_attention_layernorm"),
        ((1, 2), "mlp", "DenseReluDense", "post_attention_layernorm"),
    ):
        for side, number in zip(("encoder", "decoder"), numbers, strict=True):
            if number is None:
                continue
            layer = f"{side}.block.{{}}.layer.{number}"
            path = f"model.{side}.layers.layer"
            names[f"{path}.{norm}"] = f"{layer}.layer_norm"
            if ours == "mlp":
                names[f"{path}.mlp.up_proj"] = f"{layer}.{theirs}.wi"
                names[f"{path}.mlp.down_proj"] = f"{layer}.{theirs}.wo"
            else:
                for x in "qkvo":
                    names[f"{path}.{ours}.{x}_proj"] = f"{layer}.{theirs}.{x}"
    for side in ("encoder", "decoder"):
        # All layers use the first one's.
        names[f"model.{side}.relative_bias"] = (
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        )
    return names


_NAMES: Final = _name_layers()
_GATED: Final = {
    **_NAMES,
    **{
        f"model.{side}.layers.layer.mlp.{ours}": (
            f"{side}.block.{{}}.layer.{number}.DenseReluDense.{theirs}"
        )
        for side, number in (("encoder", 1), ("decoder", 2))
        for ours, theirs in (("gate_proj", "wi_0"), ("up_proj", "wi_1"))
    },
}


def _vary(config: Any) -> Family:
    return dataclasses.replace(T5, names=_GATED if config.decoder.gated_mlp else _NAMES)


T5 = Family(
    _read_t5,
    prefix="",
    names=_NAMES,
    # Older files repeat the embedding, and one has a table that no layer reads.
    ignored=r"(en|de)coder\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    kind="encoder-decoder",
    vary=_vary,
    is_tied_by_file=True,
)
MT5 = dataclasses.replace(T5, read_config=_read_mt5)
