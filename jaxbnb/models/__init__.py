"""Decoder-only language models in Flax NNX, loaded from checkpoints, ready to run."""

from jaxbnb.models._cache import KVCache
from jaxbnb.models._config import LlamaConfig
from jaxbnb.models._generate import generate, generate_stream
from jaxbnb.models._llama import Llama
from jaxbnb.models._load import check_pretrained, convert_to_flax, load_pretrained

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "check_pretrained",
    "convert_to_flax",
    "generate",
    "generate_stream",
    "load_pretrained",
]
