"""GPT-Neo: a GPT-2 with windows in some layers, and attention that is not scaled."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family
from jaxbnb.models.families._fields import (
    get,
    read_gpt2_like,
    read_size,
    rename,
    require,
)


def _read_gpt_neo(fields: Mapping[str, Any]) -> dict[str, Any]:
    require(fields, "hidden_size", "num_layers", "num_heads")
    fields = rename(
        fields,
        n_embd="hidden_size",
        n_layer="num_layers",
        n_head="num_heads",
        n_inner="intermediate_size",
        n_positions="max_position_embeddings",
    )
    kinds = _read_kinds(fields)
    window = {}
    if "local" in kinds:
        window["sliding_window"] = read_size(fields, "window_size", 256)
        full = tuple(i for i, kind in enumerate(kinds) if kind == "global")
        window["full_attention_layers"] = full
    return read_gpt2_like(
        fields,
        max_position_embeddings=get(fields, "n_positions", 2048),
        attention_bias=False,
        output_bias=True,
        attention_scale=1.0,
        **window,
    )


def _read_kinds(fields: Mapping[str, Any]) -> list[str]:
    """Returns "global" or "local" for each layer."""
    layers = fields["n_layer"]
    types = get(fields, "attention_types", [[["global", "local"], 12]])
    kinds: list[Any] = []
    for pair in types if isinstance(types, list) else [types]:
        match pair:
            case [[*names], int(times)] if len(kinds) + len(names) * times <= layers:
                kinds += names * times
            case _:
                raise ValueError(
                    "attention_types must be pairs of a list of names and its number "
                    f"of times, for {layers} layers; got {types!r:.100}"
                )
    if len(kinds) != layers:
        raise ValueError(
            f"attention_types are {len(kinds)} layers, and the model has {layers}"
        )
    foreign = sorted({str(kind) for kind in kinds if kind not in ("global", "local")})
    if foreign:
        raise NotImplementedError(
            f"attention_types {foreign} are not implemented; jaxbnb has 'global' and "
            "'local'"
        )
    return kinds


GPT_NEO = Family(
    _read_gpt_neo,
    prefix="transformer.",
    layers="transformer.h",
    names={
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        **{name: name.replace("self_attn", "attn.attention") for name in QKV},
        "self_attn.o_proj": "attn.attention.out_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    # Older files hold the causal mask.
    ignored=r".*\.attn\.attention\.(masked_)?bias",
)
