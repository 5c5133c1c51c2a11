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
# Tested in KerasHub too, and newer or not on that list.
OTHERS: Final[dict[str, tuple[str, str | None]]] = {
    "bart": ("BART", "BartBackbone"),
    "bert": ("BERT", "BertBackbone"),
    "deberta-v2": ("DeBERTa v3", "DebertaV3Backbone"),
    "falcon": ("Falcon", "FalconBackbone"),
}
_UNKNOWN: Final = "no JAX package known"
_FLAX: Final = "in Flax in transformers 4; untested"
_DROPPED: Final = "transformers 5 has dropped it"
# Why a family of that list is in neither.
REASONS: Final[dict[str, str]] = {
    "bigbird_pegasus": _UNKNOWN,
    "bridgetower": _UNKNOWN,
    "gpt_neox_japanese": _UNKNOWN,
    "gptsan-japanese": _DROPPED,
    "lilt": _UNKNOWN,
    "longformer": _UNKNOWN,
    "longt5": _FLAX,
    "luke": _UNKNOWN,
    "m2m_100": _UNKNOWN,
    "mbart": _FLAX,
    "mega": _DROPPED,
    "nllb-moe": _UNKNOWN,
    "open-llama": _DROPPED,
    "owlvit": "in Flax in google-research/scenic; untested",
    "plbart": _UNKNOWN,
    "roberta-prelayernorm": _FLAX,
    "rwkv": "KerasHub has only version 7; untested",
    "switch_transformers": "in Flax in google/flaxformer; untested",
    "vilt": _UNKNOWN,
    "vit-hybrid": "in Flax in google-research/vision_transformer; untested",
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
