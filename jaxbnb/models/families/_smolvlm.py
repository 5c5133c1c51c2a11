"""SmolVLM: a Llama that reads images through SigLIP's encoder."""

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
from jaxbnb.models.families._llama import LLAMA

# Files leave out fields that have transformers' default.
_TEXT: Final = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}
_VISION: Final = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
}


def _read_smolvlm(fields: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = (_get_object(fields, f"{x}_config") for x in ("text", "vision"))
    refuse(text, model_type="llama")
    token, tie = "image_token_id", "tie_word_embeddings"
    known = {**_TEXT, **{k: v for k, v in text.items() if v is not None}}
    config = LLAMA.read_config({**known, tie: get(fields, tie, False)})
    image, patch = (
        read_size(vision, name, default)
        for name, default in (("image_size", 224), ("patch_size", 32))
    )
    return {
        **config,
        "model_type": fields["model_type"],
        "vision": _read_vision(vision, (image // patch) ** 2),
        "image_size": image,
        "patch_size": patch,
        "num_channels": read_size(vision, "num_channels", 3),
        "scale_factor": read_size(fields, "scale_factor", 2),
        token: get(fields, token, 128_257),
    }


def _read_vision(fields: Mapping[str, Any], patches: int) -> dict[str, Any]:
    fields = {**_VISION, **{k: v for k, v in fields.items() if v is not None}}
    require(fields, *_VISION)
    heads = fields["num_attention_heads"]
    return {
        **{name: fields[name] for name in _VISION},
        "vocab_size": 1,
        "num_key_value_heads": heads,
        "head_dim": divide(fields["hidden_size"], heads),
        "rms_norm_eps": get(fields, "layer_norm_eps", 1e-6),
        "max_position_embeddings": max(patches, 1),
        "attention_bias": True,
        "mlp_bias": True,
        "norm": "layer",
        "activation": read_activation(fields, "hidden_act", "gelu_pytorch_tanh"),
        "gated_mlp": False,
        "positions": "learned",
    }


def _get_object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = get(fields, name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r:.100}")
    return {"model_type": "llama", **value} if name == "text_config" else value


_LAYER: Final = "model.vision_model.encoder.layers.{}"
_INNER: Final = {
    "input_layernorm": "layer_norm1",
    "post_attention_layernorm": "layer_norm2",
    **{f"self_attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
SMOLVLM = Family(
    _read_smolvlm,
    layers="model.text_model.layers",
    names={
        "model.embed_tokens": "model.text_model.embed_tokens",
        "model.norm": "model.text_model.norm",
        "vision.patches": "model.vision_model.embeddings.patch_embedding",
        "vision.positions": "model.vision_model.embeddings.position_embedding",
        "vision.norm": "model.vision_model.post_layernorm",
        "connector": "model.connector.modality_projection.proj",
        **{
            f"vision.layers.layer.{ours}": f"{_LAYER}.{theirs}"
            for ours, theirs in _INNER.items()
        },
    },
    kind="image-decoder",
)
