"""DecoderConfig: what differs between the families of decoder-only models."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.models._rope import RopeScaling, is_positive
from jaxbnb.models.families import find_family

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
NORMS: Final = ("rms", "rms_plus_one", "layer")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a `CausalLM`, under Hugging Face's field names where it has one.

    The defaults describe a Llama.

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
        rms_norm_eps: added to the mean square, or the variance, in every norm.
        max_position_embeddings: the most positions that the model takes.
        tie_word_embeddings: whether the embedding is also the output head.
        attention_bias: whether q, k, v and o projections have biases.
        mlp_bias: whether gate, up and down projections have biases.
        model_type: the family, whose names its checkpoints have.
        norm: "rms"; "rms_plus_one", whose weights are what is added to 1; or "layer",
            with mean and bias.
        post_norms: whether attention and MLP have another norm behind them.
        parallel_residual: whether the MLP reads what attention reads, not its result.
        qk_norm: whether queries and keys are normalised, head by head, before rope.
        output_bias: whether the o projection has a bias; None for ``attention_bias``.
        attention_scale: of the products; None for ``head_dim ** -0.5``.
        attention_softcap: the products go through ``cap * tanh(x / cap)``; None for no.
        logit_softcap: the same, for the logits.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated_mlp: whether the MLP is ``down(act(gate(x)) * up(x))``, and not
            ``down(act(up(x)))``.
        num_experts: MLPs a layer of which a token takes some; 0 for one that all take.
        num_experts_per_tok: how many it takes.
        embedding_scale: what embeddings are multiplied by.
        learned_positions: whether positions have an embedding, and rope is not used.
        position_offset: of the first row of that embedding.
        rotary_dim: features of each head that are rotated; None for all.
        rope_scaling: None for none.
        local_rope_theta: base, without scaling, in the layers of sliding window; None
            for that of the others.
        layers_without_rope: which, from 0.
        sliding_window: tokens that a token sees, itself among them; None for all.
        full_attention_layers: which layers see all tokens all the same, from 0.

    Raises:
        ValueError: sizes that are no positive ints or do not fit together.

    Example:
        >>> DecoderConfig(
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
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    norm: str = "rms"
    post_norms: bool = False
    parallel_residual: bool = False
    qk_norm: bool = False
    output_bias: bool | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    embedding_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    layers_without_rope: tuple[int, ...] = ()
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_attention_heads * self.head_dim > _MOST_FEATURES:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.head_dim} features are "
                f"more than {_MOST_FEATURES}; is the config damaged?"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, for rope rotates pairs; got {self.head_dim}"
            )
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2 or rotated > self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim {self.head_dim}; got "
                f"{rotated}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"num_experts {self.num_experts}"
            )
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"{name} must be one of {allowed}, got {got!r}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"yarn needs a rope_theta above 1, got {self.rope_theta}")
        if scaling is not None and scaling.kind == "longrope":
            lengths = len(scaling.short_factor), len(scaling.long_factor)
            if lengths != (rotated // 2, rotated // 2):
                raise ValueError(
                    f"longrope needs {rotated // 2} short and long factors, one for "
                    f"each frequency; got {lengths[0]} and {lengths[1]}"
                )

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """The config that a ``config.json`` describes.

        Args:
            fields: of ``config.json``, as transformers 4 or 5 writes it. Fields that do
                not change what the model computes are ignored.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: another architecture than jaxbnb has, which the message
                lists, or a variant of one that it does not compute.

        Example:
            >>> DecoderConfig.from_huggingface(
            ...     {"model_type": "llama", "vocab_size": 256, "hidden_size": 64,
            ...      "intermediate_size": 128, "num_hidden_layers": 2,
            ...      "num_attention_heads": 4}).head_dim
            16
        """
        return cls(**find_family(fields.get("model_type")).read_config(fields))


# More than any model has, and few enough for arrays of that length.
_MOST_FEATURES: Final = 2**24
_MOST: Final = {
    "num_hidden_layers": 2**14,
    # Positions are int32.
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 2**31 - 1),
}
# Counts that may be 0.
_FROM_ZERO: Final = ("num_experts", "num_experts_per_tok", "position_offset")


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless ``value`` is of the field's type; numbers positive."""
    if value is None and field.default is None:
        return
    if field.type in (int, int | None):
        least = 0 if field.name in _FROM_ZERO else 1
        most = _MOST.get(field.name, _MOST_FEATURES)
        good = type(value) is int and least <= value <= most
        want = f"{'a positive int' if least else 'an int from 0'}, at most {most}"
    elif field.type in (float, float | None):
        good, want = is_positive(value), "a positive float"
    elif field.type in (bool, bool | None):
        good, want = isinstance(value, bool), "True or False"
    elif field.type == tuple[int, ...]:
        good = isinstance(value, tuple) and all(type(item) is int for item in value)
        want = "a tuple of ints"
    else:
        kind: Any = str if field.type is str else RopeScaling
        good, want = isinstance(value, kind), f"a {kind.__name__}"
    if not good:
        raise ValueError(f"{field.name} must be {want}, got {value!r:.100}")
