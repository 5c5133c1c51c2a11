"""Decoder-only language models in Flax NNX, loaded from checkpoints, ready to run."""

from jaxbnb.models._cache import KVCache
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._flax_convert import convert_to_flax, plan_to_flax
from jaxbnb.models._generate import generate, generate_stream
from jaxbnb.models._rope import RopeScaling
from jaxbnb.models._save import save_pretrained
from jaxbnb.models.load import check_pretrained, load_pretrained

# The first family's names, from when there was one.
Llama = CausalLM
LlamaConfig = DecoderConfig

__all__ = [
    "CausalLM",
    "DecoderConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "check_pretrained",
    "convert_to_flax",
    "generate",
    "generate_stream",
    "load_pretrained",
    "plan_to_flax",
    "save_pretrained",
]
