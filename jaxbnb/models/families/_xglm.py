"""XGLM: an OPT with waves for positions, and scaled embeddings."""

import math
from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import Family
from jaxbnb.models.families._fields import get, read_gpt2_like, refuse, rename, require
from jaxbnb.models.families._opt import OPT


def _read_xglm(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "d_model", "ffn_dim", "num_layers", "attention_heads")
    refuse(fields, add_cross_attention=False)
    fields = rename(
        fields,
        n_embd="d_model",
        n_layer="num_layers",
        n_head="attention_heads",
        n_inner="ffn_dim",
        n_positions="max_position_embeddings",
    )
    pad = get(fields, "pad_token_id", 1)
    if pad not in (0, 1):
        # transformers zeroes the row of that number.
        raise NotImplementedError(
            f"pad_token_id {pad!r:.100} is not implemented for 'xglm'; jaxbnb has 0 "
            "and 1, because the row of that number is the wave of no position"
        )
    is_scaled = get(fields, "scale_embedding", True)
    return read_gpt2_like(
        {"activation_function": "gelu", **fields},
        rms_norm_eps=1e-5,
        max_position_embeddings=get(fields, "n_positions", 2048),
        embedding_scale=math.sqrt(fields["n_embd"]) if is_scaled else 1.0,
        positions="sinusoidal",
        position_offset=2,
    )


XGLM = Family(
    _read_xglm,
    names={
        "model.norm": "model.layer_norm",
        **{
            name: theirs
            for name, theirs in OPT.names.items()
            if not name.startswith("model.")
        },
    },
)
