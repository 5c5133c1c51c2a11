"""LlamaConfig: the sizes of a Llama, from its config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

# transformers' own defaults, for what older config.json files leave out.
_DEFAULTS: Final = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_DEFAULT_ROPE_THETA: Final = 10_000.0
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a `Llama`, under Hugging Face's field names.

    Attributes:
        vocab_size: tokens.
        hidden_size: features of the residual stream.
        intermediate_size: features inside the MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of the keys and values, each shared by
            ``num_attention_heads / num_key_value_heads`` query heads.
        head_dim: features a head; even.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        max_position_embeddings: the most positions that the model takes.
        tie_word_embeddings: whether the embedding is also the output head.
        attention_bias: whether q, k, v and o projections have biases.
        mlp_bias: whether gate, up and down projections have biases.

    Raises:
        ValueError: sizes that are no positive ints or do not fit together.

    Example:
        >>> LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16).rope_theta
        10000.0
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = _DEFAULT_ROPE_THETA
    rms_norm_eps: float = _DEFAULTS["rms_norm_eps"]
    max_position_embeddings: int = _DEFAULTS["max_position_embeddings"]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field.name, field.type, getattr(self, field.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, for rope rotates pairs; got {self.head_dim}"
            )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """The config that a ``config.json`` describes.

        Args:
            fields: of ``config.json``, as transformers 4 or 5 writes it. Fields that do
                not change what the model computes are ignored.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: another model than a Llama, scaled or partial rope, or
                an activation other than silu.

        Example:
            >>> LlamaConfig.from_huggingface(
            ...     {"model_type": "llama", "vocab_size": 256, "hidden_size": 64,
            ...      "intermediate_size": 128, "num_hidden_layers": 2,
            ...      "num_attention_heads": 4}).head_dim
            16
        """
        model_type = fields.get("model_type")
        if model_type != "llama":
            raise NotImplementedError(
                f"model_type {model_type!r} is not implemented; jaxbnb has 'llama'"
            )
        activation = fields.get("hidden_act") or "silu"
        if activation != "silu":
            raise NotImplementedError(
                f"hidden_act {activation!r} is not implemented; a Llama has 'silu'"
            )
        missing = [name for name in _SIZES if fields.get(name) is None]
        if missing:
            raise ValueError(
                f"the config of a Llama lacks {missing}; it has {sorted(fields)}"
            )
        sizes = {name: fields[name] for name in _SIZES}
        for name, default in _DEFAULTS.items():
            value = fields.get(name)
            sizes[name] = default if value is None else value
        heads = fields["num_attention_heads"]
        key_value_heads = fields.get("num_key_value_heads")
        head_dim = fields.get("head_dim")
        if head_dim is None:
            head_dim = _divide_hidden_size(fields["hidden_size"], heads)
        return cls(
            **sizes,
            num_key_value_heads=heads if key_value_heads is None else key_value_heads,
            head_dim=head_dim,
            rope_theta=_rope_theta(fields),
        )


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The base of plain rope, wherever transformers 4 or 5 put it."""
    theta = fields.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name} must be an object or null, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise NotImplementedError(
                f"{name} of type {kind!r} is not implemented; jaxbnb has 'default' "
                "(unscaled) rope"
            )
        part = rope.get("partial_rotary_factor", 1.0)
        if part != 1.0:
            raise NotImplementedError(
                f"{name} rotates {part!r} of each head; jaxbnb rotates all of it"
            )
        theta = rope.get("rope_theta", theta)
    return _DEFAULT_ROPE_THETA if theta is None else theta


def _divide_hidden_size(hidden_size: Any, heads: Any) -> int:
    ints = isinstance(hidden_size, int) and isinstance(heads, int)
    if not ints or heads < 1 or hidden_size % heads:
        raise ValueError(
            f"without head_dim, hidden_size must be a multiple of num_attention_heads; "
            f"got {hidden_size!r} and {heads!r}"
        )
    return hidden_size // heads


def _check(name: str, kind: Any, value: Any) -> None:
    """Raises ValueError unless ``value`` is a bool, or a positive int or float."""
    allowed = (int, float) if kind is float else kind
    if kind is bool:
        good, want = isinstance(value, bool), "True or False"
    else:
        good = isinstance(value, allowed) and not isinstance(value, bool)
        good, want = good and 0 < value < math.inf, f"a positive {kind.__name__}"
    if not good:
        raise ValueError(f"{name} must be {want}, got {value!r}")
