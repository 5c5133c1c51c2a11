"""EncoderConfig: what differs between encoders with a head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.models._config import DecoderConfig
from jaxbnb.models.families import find_family

HEADS: Final = ("classes", "tokens")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The sizes and variants of an `EncoderModel`.

    Attributes:
        layer: sizes of the layers, of the vocabulary and of the positions. An image has
            no vocabulary, and one position for each patch.
        head: "classes" for logits of each text or image, or "tokens" for logits of the
            vocabulary at each token.
        num_labels: number of classes.
        has_dense: whether the head of classes has a layer of its own before the last.
        norms_first: whether norms come before attention and MLP, and not after them.
        num_token_types: number of kinds of tokens, such as first and second text; 0 for
            images.
        counts_padding: whether padding has positions.
        image_size: height and width in pixels; None for a text.
        patch_size: height and width of a patch in pixels; None for a text.
        num_channels: number of colours; 0 for a text.
        num_extra_tokens: number of tokens before the patches: 1, or 2 with a token for
            distillation.

    Raises:
        ValueError: a value is out of range, or values do not fit together.

    Example:
        >>> from jaxbnb.models import EncoderConfig
        >>> config = EncoderConfig.from_huggingface(
        ...     {"model_type": "bert", "vocab_size": 64, "hidden_size": 32,
        ...      "intermediate_size": 64, "num_hidden_layers": 2,
        ...      "num_attention_heads": 2, "max_position_embeddings": 16,
        ...      "architectures": ["BertForSequenceClassification"]})
        >>> config.head, config.num_labels, config.norms_first
        ('classes', 2, False)
    """

    layer: DecoderConfig
    head: str = "classes"
    num_labels: int = 2
    has_dense: bool = True
    norms_first: bool = False
    num_token_types: int = 0
    counts_padding: bool = True
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    num_channels: int = 0
    num_extra_tokens: int = 1

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {self.head!r}")
        for name, least in (
            ("num_labels", 1),
            ("num_token_types", 0),
            ("num_channels", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= 2**24:
                raise ValueError(
                    f"{name} must be an int from {least} to {2**24}, got {value!r:.100}"
                )
        for name in ("image_size", "patch_size"):
            value: Any = getattr(self, name)
            if value is None and self.num_channels == 0:
                continue
            is_pair = isinstance(value, tuple) and len(value) == 2
            sizes: Any = value if is_pair else (0,)
            if any(type(x) is not int or x < 1 for x in sizes):
                raise ValueError(
                    f"{name} must be two positive ints, got {value!r:.100}"
                )
        if self.num_channels and not all(self.grid):
            raise ValueError(
                f"image_size {self.image_size} must be at least patch_size "
                f"{self.patch_size}"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "EncoderConfig":
        """Reads the config that a ``config.json`` describes.

        Args:
            fields: contents of ``config.json``; ``architectures`` names the head.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: jaxbnb does not have this architecture, or not this
                variant of it; or it is not an encoder.
        """
        family = find_family(fields.get("model_type"))
        if family.kind != "encoder":
            raise NotImplementedError(
                f"model_type {fields.get('model_type')!r} is of the kind "
                f"{family.kind}, not an encoder"
            )
        values: dict[str, Any] = {**family.read_config(fields)}
        values["layer"] = DecoderConfig(**values["layer"])
        return cls(**values)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches in a column and in a row of an image."""
        if self.image_size is None or self.patch_size is None:
            return 0, 0
        (height, width), (tall, wide) = self.image_size, self.patch_size
        return height // tall, width // wide

    @property
    def model_type(self) -> str:
        """Family of the model, which decides the names in its checkpoints."""
        return self.layer.model_type

    @property
    def tie_word_embeddings(self) -> bool:
        """False: a head of tokens always uses the embedding, and has no other."""
        return False

    @property
    def num_mlps(self) -> int:
        """Number of MLPs in all layers."""
        return self.layer.num_mlps
