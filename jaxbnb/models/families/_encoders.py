"""BERT, RoBERTa, XLM-RoBERTa, ViT and DeiT: encoders with a head."""

import dataclasses
import re
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

_HEADS: Final = {
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "ForMaskedLM": "tokens",
}


def _read_head(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the head by ``architectures``, and counts the classes."""
    names = get(fields, "architectures", [])
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    heads = [head for end, head in _HEADS.items() if str(name).endswith(end)]
    if not heads:
        raise NotImplementedError(
            f"architectures {names!r:.200} are not implemented for "
            f"{fields.get('model_type')!r}; jaxbnb has models that end in {[*_HEADS]}"
        )
    labels = get(fields, "id2label", {})
    count = fields.get("num_labels")
    if count is None:
        count = len(labels) if isinstance(labels, Mapping) and labels else 2
    return {"head": heads[0], "num_labels": count}


def _read_layer(fields: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    require(fields, *names, "num_attention_heads")
    heads = fields["num_attention_heads"]
    return {
        **{name: fields[name] for name in names},
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": divide(fields["hidden_size"], heads),
        "rms_norm_eps": get(fields, "layer_norm_eps", 1e-12),
        "attention_bias": True,
        "mlp_bias": True,
        "model_type": fields["model_type"],
        "norm": "layer",
        "activation": read_activation(fields, "hidden_act", "gelu"),
        "gated_mlp": False,
        "positions": "learned",
        **changes,
    }


def _read_bert(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read_text(fields, offset=0, counts_padding=True, types=2)


def _read_roberta(fields: Mapping[str, Any]) -> dict[str, Any]:
    pad = get(fields, "pad_token_id", 1)
    if type(pad) is not int or pad < 0:
        raise ValueError(f"pad_token_id must be an int from 0, got {pad!r:.100}")
    return _read_text(fields, offset=pad + 1, counts_padding=False, types=2)


def _read_text(
    fields: Mapping[str, Any], *, offset: int, counts_padding: bool, types: int
) -> dict[str, Any]:
    require(fields, "vocab_size")
    refuse(
        fields,
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    rows = read_size(fields, "max_position_embeddings", 512)
    if rows <= offset:
        raise ValueError(
            f"max_position_embeddings {rows} must be more than pad_token_id + 1, "
            f"{offset}"
        )
    layer = _read_layer(
        fields,
        vocab_size=fields["vocab_size"],
        max_position_embeddings=rows - offset,
        position_offset=offset,
    )
    return {
        **_read_head(fields),
        "layer": layer,
        "num_token_types": read_size(fields, "type_vocab_size", types),
        "counts_padding": counts_padding,
    }


def _read_vit(fields: Mapping[str, Any]) -> dict[str, Any]:
    image, patch = (
        _read_pair(fields, name, default)
        for name, default in (("image_size", 224), ("patch_size", 16))
    )
    extra = 2 if fields["model_type"] == "deit" else 1
    positions = (image[0] // patch[0]) * (image[1] // patch[1]) + extra
    layer = _read_layer(
        fields,
        vocab_size=1,
        max_position_embeddings=positions,
        attention_bias=get(fields, "qkv_bias", True),
        output_bias=True,
    )
    return {
        **_read_head(fields),
        "layer": layer,
        "has_dense": False,
        "norms_first": True,
        "image_size": image,
        "patch_size": patch,
        "num_channels": read_size(fields, "num_channels", 3),
        "num_extra_tokens": extra,
    }


def _read_pair(fields: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    value = get(fields, name, default)
    pair = [value, value] if type(value) is int else value
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    if not is_pair or any(type(x) is not int or not 1 <= x <= 2**14 for x in pair):
        raise ValueError(f"{name} must be one or two positive ints, got {value!r:.100}")
    return pair[0], pair[1]


def _name_text(prefix: str) -> dict[str, str]:
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{}}"
    inside = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "post_attention_layernorm": "attention.output.LayerNorm",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
        "post_feedforward_layernorm": "output.LayerNorm",
    }
    return {
        "model.embed_tokens": f"{embeddings}.word_embeddings",
        "model.embed_positions": f"{embeddings}.position_embeddings",
        "model.embed_types": f"{embeddings}.token_type_embeddings",
        "model.embed_norm": f"{embeddings}.LayerNorm",
        **{f"model.layers.layer.{ours}": f"{layer}.{x}" for ours, x in inside.items()},
    }


def _name_image(prefix: str) -> dict[str, str]:
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{}}"
    inside = {
        "input_layernorm": "layernorm_before",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.o_proj": "attention.output.dense",
        "post_attention_layernorm": "layernorm_after",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
    }
    return {
        "model.patches": f"{embeddings}.patch_embeddings.projection",
        "model.cls_token": f"{embeddings}.cls_token",
        "model.distillation_token": f"{embeddings}.distillation_token",
        "model.position_embeddings": f"{embeddings}.position_embeddings",
        "model.norm": f"{prefix}.layernorm",
        **{f"model.layers.layer.{ours}": f"{layer}.{x}" for ours, x in inside.items()},
        "head.out_proj": "classifier",
    }


def _vary_bert(config: Any) -> Family:
    predictions = "cls.predictions"
    heads = {
        "classes": {"head.dense": "bert.pooler.dense", "head.out_proj": "classifier"},
        "tokens": {
            "head": predictions,
            "head.dense": f"{predictions}.transform.dense",
            "head.norm": f"{predictions}.transform.LayerNorm",
        },
    }
    return dataclasses.replace(BERT, names={**BERT.names, **heads[config.head]})


def _vary_roberta(config: Any) -> Family:
    heads = {
        "classes": {
            "head.dense": "classifier.dense",
            "head.out_proj": "classifier.out_proj",
        },
        "tokens": {
            "head": "lm_head",
            "head.dense": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
        },
    }
    return dataclasses.replace(ROBERTA, names={**ROBERTA.names, **heads[config.head]})


BERT = Family(
    _read_bert,
    prefix="bert.",
    names=_name_text("bert"),
    # The names of the first checkpoints.
    renamed={
        r"(.*)LayerNorm\.gamma": r"\1LayerNorm.weight",
        r"(.*)LayerNorm\.beta": r"\1LayerNorm.bias",
    },
    # Copies of the embedding and the bias, and the heads of pretraining.
    ignored=r".*\.position_ids|cls\.predictions\.decoder\.(weight|bias)"
    r"|cls\.seq_relationship\..*|bert\.pooler\.dense\.(weight|bias)",
    kind="encoder",
    vary=_vary_bert,
)
ROBERTA = Family(
    _read_roberta,
    prefix="roberta.",
    names=_name_text("roberta"),
    ignored=r".*\.position_ids|lm_head\.decoder\.(weight|bias)"
    r"|roberta\.pooler\.dense\.(weight|bias)",
    kind="encoder",
    vary=_vary_roberta,
)


# Modules of a layer of ViT: in files, and in memory since transformers 5.9.
_IMAGE_MODULES: Final = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_": "layernorm_",
}


def _make_image_family(prefix: str) -> Family:
    in_files, in_memory = f"{prefix}.encoder.layer", f"{prefix}.layers"

    def rename(old: str, new: str, modules: Mapping[str, str]) -> dict[str, str]:
        return {
            rf"{re.escape(old)}\.(\d+)\.{re.escape(module)}": rf"{new}.\1.{other}"
            for module, other in modules.items()
        }

    reverse = {theirs: ours for ours, theirs in _IMAGE_MODULES.items()}
    return Family(
        _read_vit,
        prefix=f"{prefix}.",
        names=_name_image(prefix),
        renamed=rename(in_memory, in_files, reverse),
        in_memory=rename(in_files, in_memory, _IMAGE_MODULES),
        kind="encoder",
    )


VIT = _make_image_family("vit")
DEIT = _make_image_family("deit")
