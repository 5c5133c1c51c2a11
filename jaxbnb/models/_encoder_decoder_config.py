"""EncoderDecoderConfig: what differs between encoder-decoder models."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._encoder_config import EncoderConfig
from jaxbnb.models._vision_config import VisionLMConfig
from jaxbnb.models.families import find_family

TIE: Final = "tie_word_embeddings"
# transformers 5 writes whether a T5 scales the hidden states before its head.
SCALE: Final = "scale_decoder_outputs"


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """The sizes and variants of an `EncoderDecoderLM`.

    Attributes:
        decoder: sizes of the decoder. The layers of the encoder have the same sizes.
        num_encoder_layers: number of layers of the encoder.
        decoder_start_token_id: token that every target begins with.
        pad_token_id: token that stands for padding in the decoder's input.
        num_buckets: number of distances that relative positions tell apart, a multiple
            of 4; 0 for no relative positions.
        max_distance: distance, in tokens, from which on all distances are one.
        scales_head: whether hidden states are multiplied by ``hidden_size ** -0.5``
            before the head.
        has_key_bias: whether keys have a bias if other projections do.
        num_mel_bins: number of log-mel features of a frame of audio; 0 for a model that
            reads tokens.
        max_source_positions: number of positions of audio, of two frames each.

    Raises:
        ValueError: a number is out of range, or the decoder has variants that only a
            `CausalLM` computes.

    Example:
        >>> from jaxbnb.models import EncoderDecoderConfig
        >>> config = EncoderDecoderConfig.from_huggingface(
        ...     {"model_type": "t5", "vocab_size": 256, "d_model": 64, "d_kv": 16,
        ...      "d_ff": 128, "num_layers": 2, "num_heads": 4})
        >>> config.decoder.head_dim, config.num_encoder_layers, config.scales_head
        (16, 2, True)
    """

    decoder: DecoderConfig
    num_encoder_layers: int
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    num_buckets: int = 32
    max_distance: int = 128
    scales_head: bool = False
    has_key_bias: bool = True
    num_mel_bins: int = 0
    max_source_positions: int = 1500

    def __post_init__(self):
        for name, least in (
            *(("num_encoder_layers", 1), ("num_buckets", 0), ("max_distance", 1)),
            *(("num_mel_bins", 0), ("max_source_positions", 1)),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= 2**20:
                raise ValueError(
                    f"{name} must be an int from {least} to {2**20}, got {value!r:.100}"
                )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                "num_buckets must be a multiple of 4, and max_distance more than half "
                f"of it; got {self.num_buckets} and {self.max_distance}"
            )
        for name in ("decoder_start_token_id", "pad_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} must be a token, from 0 to {self.vocab_size - 1}; got "
                    f"{value!r:.100}"
                )
        for name in ("scales_head", "has_key_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} must be True or False, got {getattr(self, name)!r:.100}"
                )
        if self.decoder.positions not in ("rope", "learned"):
            raise ValueError(
                f"positions {self.decoder.positions!r} are for a CausalLM; an "
                "EncoderDecoderConfig has 'learned', or the default for relative ones"
            )
        for name in _NOT_HERE:
            default = getattr(DecoderConfig, name)
            if getattr(self.decoder, name) != default:
                raise ValueError(
                    f"{name} {getattr(self.decoder, name)!r} is for a CausalLM; the "
                    f"decoder of an EncoderDecoderConfig has {default!r}"
                )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "EncoderDecoderConfig":
        """Reads the config that a ``config.json`` describes.

        Args:
            fields: contents of ``config.json``, as transformers 4 or 5 writes it.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: jaxbnb does not have this architecture, or not this
                variant of it; or it is not an encoder-decoder.
        """
        family = find_family(fields.get("model_type"))
        if family.kind != "encoder-decoder":
            raise NotImplementedError(
                f"model_type {fields.get('model_type')!r} is of the kind "
                f"{family.kind}, not an encoder-decoder"
            )
        values: dict[str, Any] = {**family.read_config(fields)}
        values["decoder"] = DecoderConfig(**values["decoder"])
        return cls(**values)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, which encoder and decoder share."""
        return self.decoder.vocab_size

    @property
    def model_type(self) -> str:
        """Family of the model, which decides the names in its checkpoints."""
        return self.decoder.model_type

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is also the output head."""
        return self.decoder.tie_word_embeddings

    @property
    def max_position_embeddings(self) -> int:
        """Largest number of tokens in a text of the decoder."""
        return self.decoder.max_position_embeddings

    @property
    def num_mlps(self) -> int:
        """Number of MLPs in all layers."""
        return self.num_encoder_layers + self.decoder.num_mlps


ModelConfig: TypeAlias = DecoderConfig | EncoderDecoderConfig | EncoderConfig
# Fields of DecoderConfig that an encoder-decoder's layers do not read.
_NOT_HERE: Final = (
    *("post_norms", "parallel_residual", "qk_norm", "attention_softcap"),
    *("logit_softcap", "num_experts", "embedding_scale", "embedding_norm"),
    *("position_offset", "shared_norm", "interleaved_rope", "head_bias"),
    *("rope_scaling", "sliding_window"),
)


def get_layer_config(config: ModelConfig) -> DecoderConfig:
    """Returns the sizes of a model's layers."""
    if isinstance(config, EncoderDecoderConfig):
        return config.decoder
    return config.layer if isinstance(config, EncoderConfig) else config


def replace_fields(config: Any, **changes: Any) -> Any:
    """Returns a `ModelConfig` with other values of fields that a `DecoderConfig` has.

    Example:
        >>> from jaxbnb.models import EncoderDecoderConfig
        >>> config = EncoderDecoderConfig.from_huggingface(
        ...     {"model_type": "t5", "vocab_size": 256, "d_model": 64, "d_kv": 16,
        ...      "d_ff": 128, "num_layers": 2, "num_heads": 4})
        >>> replace_fields(config, tie_word_embeddings=False).tie_word_embeddings
        False
    """
    if isinstance(config, EncoderDecoderConfig):
        changes = {"decoder": dataclasses.replace(config.decoder, **changes)}
    return dataclasses.replace(config, **changes)


def read_model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Reads a ``config.json`` of any family.

    Raises:
        ValueError: fields are missing or make no sense.
        NotImplementedError: jaxbnb does not have this architecture or variant.
    """
    family = find_family(fields.get("model_type"))
    if family.kind == "encoder-decoder":
        return EncoderDecoderConfig.from_huggingface(fields)
    if family.kind == "encoder":
        return EncoderConfig.from_huggingface(fields)
    if family.kind == "image-decoder":
        return VisionLMConfig.from_huggingface(fields)
    return DecoderConfig.from_huggingface(fields)


def untie_fields(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns ``config.json`` of a model with a head besides its embedding.

    A T5 goes by `TIE` to know if it scales hidden states, unless there is `SCALE`.
    """
    fields = {**fields, TIE: False}
    if isinstance(config, EncoderDecoderConfig):
        fields[SCALE] = config.scales_head
    return fields
