"""Rotary position embeddings in GGUF files: their scaling, and the order of rows."""

from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.convert._gguf_description import RowOrder
from jaxbnb.convert._gguf_fields import Fields

# Tensors that hold factors of the scaling. In Hugging Face's terms they belong to the
# config.
ROPE_TENSORS: Final = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


def read_rope_scaling(fields: Fields, rotated: int) -> dict[str, Any]:
    """Returns the config's field ``rope_scaling``, or no field without scaling.

    Args:
        fields: metadata of the file.
        rotated: dimensions of each head that are rotated.
    """
    key = "rope.scaling.type"
    kind = fields.get(key, str, "none")
    freqs, long, short = ROPE_TENSORS
    tensors = fields.gguf.tensors
    original = fields.size(
        "rope.scaling.original_context_length", fields.size("context_length")
    )
    if long in tensors and short in tensors:
        fields.refuse(key, kind, "none", "longrope")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": fields.factors(long, rotated // 2),
            "short_factor": fields.factors(short, rotated // 2),
            "original_max_position_embeddings": original,
        }
        if fields.has("rope.scaling.attn_factor"):
            factor = fields.positive("rope.scaling.attn_factor")
            scaling["attention_factor"] = factor
        return {"rope_scaling": scaling}
    if freqs in tensors:
        # llama.cpp writes Llama 3's scaling as one factor for each frequency. The only
        # type that takes arbitrary factors is longrope, so both its lists get them.
        fields.refuse(key, kind, "none")
        factors = fields.factors(freqs, rotated // 2)
        scaling = {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": original,
            "attention_factor": 1.0,
        }
        return {"rope_scaling": scaling}
    fields.refuse(key, kind, "none", "linear", "yarn")
    if kind == "none":
        return {}
    factor = fields.positive("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            name = f"rope.scaling.{name}"
            fields.refuse(name, fields.positive(name, 1.0), 1.0)
        name = "rope.scaling.yarn_log_multiplier"
        fields.refuse(name, fields.get(name, float, 0.0), 0.0)
        scaling |= {
            "original_max_position_embeddings": original,
            "beta_fast": fields.positive("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        }
    return {"rope_scaling": scaling}


def undo_interleaving(config: Mapping[str, Any]) -> dict[str, RowOrder]:
    """Returns how to undo llama.cpp's order of the rows of queries and keys.

    Rope rotates pairs of dimensions of a head. Hugging Face pairs i with i + d/2. In
    these files the two dimensions of a pair are neighbours, 2 i and 2 i + 1.
    """
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    return {"attn_q": ((heads, -1, 2), (1, 2)), "attn_k": ((keys, -1, 2), (1, 2))}
