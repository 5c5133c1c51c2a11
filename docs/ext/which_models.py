"""The table of ``which_models.md``, made of the families that jaxbnb has."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from jaxbnb.models.families import FAMILIES

# Tests import this file without Sphinx.
if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The families of Hugging Face's post of 2023 on 4-bit models, by model_type, with their
# names, and those in which they are tested in KerasHub.
# https://huggingface.co/blog/4bit-transformers-bitsandbytes
LISTED: Final[dict[str, tuple[str, str | None]]] = {
    "bigbird_pegasus": ("BigBird-Pegasus", None),
    "blip-2": ("BLIP-2", "BLIP2Backbone"),
    "bloom": ("BLOOM", "BloomBackbone"),
    "bridgetower": ("BridgeTower", None),
    "codegen": ("CodeGen", None),
    "deit": ("DeiT", "DeiTBackbone"),
    "esm": ("ESM", "ESMBackbone"),
    "gpt2": ("GPT-2", "GPT2Backbone"),
    "gpt_bigcode": ("GPT-BigCode", None),
    "gpt_neo": ("GPT-Neo", None),
    "gpt_neox": ("GPT-NeoX", "GPTNeoXBackbone"),
    "gpt_neox_japanese": ("GPT-NeoX Japanese", None),
    "gptj": ("GPT-J", None),
    "gptsan-japanese": ("GPTSAN Japanese", None),
    "lilt": ("LiLT", None),
    "llama": ("Llama", None),
    "longformer": ("Longformer", None),
    "longt5": ("LongT5", None),
    "luke": ("LUKE", None),
    "m2m_100": ("M2M-100", None),
    "mbart": ("mBART", None),
    "mega": ("MEGA", None),
    "mt5": ("mT5", None),
    "nllb-moe": ("NLLB-MoE", None),
    "open-llama": ("Open-Llama", None),
    "opt": ("OPT", "OPTBackbone"),
    "owlvit": ("OWL-ViT", None),
    "plbart": ("PLBart", None),
    "roberta": ("RoBERTa", "RobertaBackbone"),
    "roberta-prelayernorm": ("RoBERTa-PreLayerNorm", None),
    "rwkv": ("RWKV", None),
    "switch_transformers": ("Switch Transformers", None),
    "t5": ("T5", "T5Backbone"),
    "vilt": ("ViLT", None),
    "vit": ("ViT", "ViTBackbone"),
    "vit-hybrid": ("ViT Hybrid", None),
    "whisper": ("Whisper", "WhisperBackbone"),
    "xglm": ("XGLM", None),
    "xlm-roberta": ("XLM-RoBERTa", "XLMRobertaBackbone"),
}
# Families that are not on that list.
OTHERS: Final[dict[str, tuple[str, str | None]]] = {
    "bart": ("BART", "BartBackbone"),
    "bert": ("BERT", "BertBackbone"),
    "deberta-v2": ("DeBERTa v3", "DebertaV3Backbone"),
    "falcon": ("Falcon", "FalconBackbone"),
    "gemma2": ("Gemma 2", None),
    "gemma3": ("Gemma 3", None),
    "gemma3_text": ("Gemma 3, text alone", None),
    "gpt_oss": ("gpt-oss", None),
    "mistral": ("Mistral", None),
    "mixtral": ("Mixtral", None),
    "phi3": ("Phi-3", None),
    "qwen2": ("Qwen2, Qwen2.5", None),
    "qwen3": ("Qwen3", None),
    "smollm3": ("SmolLM3", None),
    "smolvlm": ("SmolVLM", None),
}
# KerasHub has these too, and nobody has tested them with jaxbnb.keras.
UNTESTED: Final[dict[str, str]] = {
    "gemma2": "GemmaBackbone",
    "gemma3": "Gemma3Backbone",
    "gemma3_text": "Gemma3Backbone",
    "gpt_oss": "GptOssBackbone",
    "llama": "LlamaBackbone",
    "mistral": "MistralBackbone",
    "mixtral": "MixtralBackbone",
    "phi3": "Phi3Backbone",
    "qwen2": "QwenBackbone",
    "qwen3": "Qwen3Backbone",
    "smollm3": "SmolLM3Backbone",
}
_UNKNOWN: Final = "no JAX package known"
_FLAX: Final = "in Flax in transformers 4; untested"
_DROPPED: Final = "transformers 5 has dropped it"
# Why a family of that list is in neither.
REASONS: Final[dict[str, str]] = {
    "bigbird_pegasus": "block-sparse attention; Pegasus with such an encoder is in "
    "Flax in google-research/pegasus; untested",
    "bridgetower": f"two encoders with layers between them; {_UNKNOWN}",
    "gpt_neox_japanese": f"GPT-NeoX with a bias in the last layer alone; {_UNKNOWN}",
    "gptsan-japanese": _DROPPED,
    "lilt": f"RoBERTa with a second stream for the layout; {_UNKNOWN}",
    "longformer": f"attention in windows, and to global tokens; {_UNKNOWN}",
    "longt5": _FLAX,
    "luke": f"attention with queries of their own for entities; {_UNKNOWN}",
    "m2m_100": f"an encoder-decoder with sinusoidal positions; {_UNKNOWN}",
    "mbart": _FLAX,
    "mega": _DROPPED,
    "nllb-moe": f"M2M-100 with experts; {_UNKNOWN}",
    "open-llama": _DROPPED,
    "owlvit": "in Flax in google-research/scenic; untested",
    "plbart": f"BART with scaled embeddings; {_UNKNOWN}",
    "roberta-prelayernorm": _FLAX,
    "rwkv": "a recurrent model; KerasHub has only version 7, and EasyDeL marks its "
    "version 4 as not working",
    "switch_transformers": "in Flax in google/flaxformer; untested",
    "vilt": f"an encoder of text and patches; {_UNKNOWN}",
    "vit-hybrid": f"{_DROPPED}; in Flax in google-research/vision_transformer; "
    "untested",
}


def make_table(families: Collection[str] = tuple(FAMILIES)) -> str:
    """Returns the table in Markdown: the families listed, and others that are there."""
    others = {name: (name, None) for name in sorted(families) if name not in LISTED}
    others = {name: OTHERS.get(name, row) for name, row in {**OTHERS, **others}.items()}
    lines = [
        "| family | `model_type` | ours | in KerasHub, with `jaxbnb.keras` | or |",
        "|---|---|---|---|---|",
    ]
    for model_type, (name, keras) in {**LISTED, **dict(sorted(others.items()))}.items():
        ours = "yes" if model_type in families else "no"
        theirs = f"`{keras}`" if keras else "no"
        if model_type in UNTESTED:
            theirs = f"`{UNTESTED[model_type]}`, untested"
        has_neither = ours == theirs == "no"
        reason = REASONS.get(model_type, "") if has_neither else ""
        lines.append(f"| {name} | `{model_type}` | {ours} | {theirs} | {reason} |")
    return "\n".join(lines)


def setup(app: "Sphinx") -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _insert_table)
    return {"version": "1", "parallel_read_safe": True}


def _insert_table(app: "Sphinx", page: str, source: list[str]) -> None:
    if page == "which_models":
        source[0] = source[0].replace("{{ families }}", make_table())
