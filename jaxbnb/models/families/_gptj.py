"""GPT-J and CodeGen: one norm for attention and MLP, and interleaved rope."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from jaxbnb.models.families._family import QKV, Family, Sizes
from jaxbnb.models.families._fields import get, read_gpt2_like, read_size, refuse

# The number of devices that CodeGen was trained on. Files keep their order of rows.
_SHARDS: Final = 4


def _read_gptj(fields: Mapping[str, Any]) -> dict[str, Any]:
    # The head has a bias, which an embedding does not.
    refuse(fields, tie_word_embeddings=False)
    return read_gpt2_like(
        fields,
        tie_word_embeddings=False,
        max_position_embeddings=get(fields, "n_positions", 2048),
        attention_bias=False,
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
        positions="rope",
        rotary_dim=read_size(fields, "rotary_dim", 64),
        interleaved_rope=True,
    )


def _read_codegen(fields: Mapping[str, Any]) -> dict[str, Any]:
    config = _read_gptj(fields)
    if config["hidden_size"] % _SHARDS:
        raise ValueError(
            f"n_embd of a codegen must be a multiple of {_SHARDS}, because its "
            f"projection is stored in {_SHARDS} parts; got {config['hidden_size']}"
        )
    return config


def _find_rows(config: Sizes) -> list[np.ndarray]:
    """Finds the rows of q, k and v; each shard is its part of q, v and k."""
    hidden = config.num_attention_heads * config.head_dim
    rows = np.arange(3 * hidden).reshape(_SHARDS, 3, -1)
    return [rows[:, part].ravel() for part in (0, 2, 1)]


_NAMES: Final = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}
# Older files hold the causal mask.
_IGNORED: Final = r".*\.attn\.((masked_)?bias|causal_mask)"

GPTJ = Family(
    _read_gptj,
    prefix="transformer.",
    layers="transformer.h",
    names=_NAMES | {name: name.replace("self_attn", "attn") for name in QKV},
    ignored=_IGNORED,
)
CODEGEN = Family(
    _read_codegen,
    prefix="transformer.",
    layers="transformer.h",
    names=_NAMES | dict.fromkeys(QKV, "attn.qkv_proj"),
    fused=((QKV, _find_rows),),
    ignored=_IGNORED,
)
