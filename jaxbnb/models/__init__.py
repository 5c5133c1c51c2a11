"""Language models in Flax NNX: load, generate, save."""

from jaxbnb.models._cache import KVCache
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._encoder import EncoderModel
from jaxbnb.models._encoder_config import EncoderConfig
from jaxbnb.models._encoder_decoder import EncoderDecoderCache, Source
from jaxbnb.models._encoder_decoder_config import EncoderDecoderConfig
from jaxbnb.models._encoder_decoder_lm import EncoderDecoderLM
from jaxbnb.models._flax_convert import convert_to_flax, plan_to_flax
from jaxbnb.models._generate import generate, generate_stream
from jaxbnb.models._gguf_convert import convert_to_gguf, plan_to_gguf
from jaxbnb.models._resize import resize_token_embeddings
from jaxbnb.models._rope import RopeScaling
from jaxbnb.models._save import save_pretrained
from jaxbnb.models._vision import IllustratedLM, VisionLM
from jaxbnb.models._vision_config import VisionLMConfig
from jaxbnb.models.load import check_pretrained, load_pretrained

# Names from the time when Llama was the only family.
Llama = CausalLM
LlamaConfig = DecoderConfig

__all__ = [
    "CausalLM",
    "DecoderConfig",
    "EncoderConfig",
    "EncoderDecoderCache",
    "EncoderDecoderConfig",
    "EncoderDecoderLM",
    "EncoderModel",
    "IllustratedLM",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Source",
    "VisionLM",
    "VisionLMConfig",
    "check_pretrained",
    "convert_to_flax",
    "convert_to_gguf",
    "generate",
    "generate_stream",
    "load_pretrained",
    "plan_to_flax",
    "plan_to_gguf",
    "resize_token_embeddings",
    "save_pretrained",
]
