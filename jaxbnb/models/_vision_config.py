"""VisionLMConfig: a decoder that also reads images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxbnb.models._config import DecoderConfig
from jaxbnb.models.families import find_family


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLMConfig(DecoderConfig):
    """The sizes and variants of a `VisionLM`: those of its decoder, and of its images.

    Attributes:
        vision: sizes of the layers that read an image; a patch is a token to them.
        image_size: height and width of an image in pixels.
        patch_size: height and width of a patch in pixels.
        num_channels: number of colours.
        scale_factor: side of the squares of patches that become one token of the text.
        image_token_id: token that stands for a part of an image.

    Raises:
        ValueError: see `DecoderConfig`; or patches do not fit the image or the squares.

    Example:
        >>> from jaxbnb.models import VisionLMConfig
        >>> config = VisionLMConfig.from_huggingface(
        ...     {"model_type": "smolvlm", "image_token_id": 3, "text_config":
        ...      {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        ...       "num_hidden_layers": 2, "num_attention_heads": 2}, "vision_config":
        ...      {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        ...       "num_attention_heads": 2, "image_size": 16, "patch_size": 4}})
        >>> config.tokens_per_image
        4
    """

    vision: DecoderConfig
    image_size: int
    patch_size: int
    num_channels: int
    scale_factor: int
    image_token_id: int

    def __post_init__(self):
        super().__post_init__()
        if self.patches_per_side % self.scale_factor or not self.patches_per_side:
            raise ValueError(
                f"image_size {self.image_size} holds {self.patches_per_side} patches "
                f"of {self.patch_size} pixels in a row, which must be a multiple of "
                f"scale_factor {self.scale_factor}"
            )
        if self.image_token_id >= self.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} must be below vocab_size "
                f"{self.vocab_size}"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "VisionLMConfig":
        """Reads the config that a ``config.json`` describes.

        Args:
            fields: contents of ``config.json``, as transformers writes it.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: jaxbnb does not have this architecture, or not this
                variant of it; or it does not read images.
        """
        family = find_family(fields.get("model_type"))
        if family.kind != "image-decoder":
            raise NotImplementedError(
                f"model_type {fields.get('model_type')!r} is of the kind "
                f"{family.kind}, not an image-decoder"
            )
        values: dict[str, Any] = family.read_config(fields)
        values = {**values, "vision": DecoderConfig(**values["vision"])}
        return cls(**values)

    @property
    def patches_per_side(self) -> int:
        """Number of patches in a row of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens of the text that an image takes."""
        return (self.patches_per_side // self.scale_factor) ** 2
