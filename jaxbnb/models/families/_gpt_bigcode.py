"""GPT-BigCode (StarCoder, SantaCoder): a GPT-2 with one head of keys and values."""

from collections.abc import Mapping
from typing import Any

from jaxbnb.models.families._family import QKV, Family, by_group
from jaxbnb.models.families._fields import get, read_gpt2_like, refuse
from jaxbnb.models.families._gpt2 import GPT2


def _read_gpt_bigcode(fields: Mapping[str, Any]) -> dict[str, Any]:
    refuse(fields, scale_attn_weights=True, add_cross_attention=False)
    shared = {"num_key_value_heads": 1} if get(fields, "multi_query", True) else {}
    return read_gpt2_like(fields, **shared)


GPT_BIGCODE = Family(
    _read_gpt_bigcode,
    prefix=GPT2.prefix,
    layers=GPT2.layers,
    names=GPT2.names,
    fused=((QKV, by_group),),
    ignored=GPT2.ignored,
)
