"""DecoderConfig: what differs between the families of decoder-only models."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.models._rope import RopeScaling, is_positive
from jaxbnb.models.families import find_family

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
NORMS: Final = ("rms", "rms_plus_one", "layer")
POSITIONS: Final = ("rope", "learned", "sinusoidal", "alibi", "scaled_alibi")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and variants of a `CausalLM`, under Hugging Face's names if they exist.

    The defaults describe a Llama.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: features of the residual stream.
        intermediate_size: features inside the MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, each shared by
            ``num_attention_heads / num_key_value_heads`` query heads.
        head_dim: features per head; even.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square, or to the variance, in every norm.
        max_position_embeddings: largest number of positions that the model takes.
        tie_word_embeddings: whether the embedding is also the output head.
        attention_bias: whether the q, k, v and o projections have biases.
        mlp_bias: whether the gate, up and down projections have biases.
        model_type: family of the model, which decides the names in its checkpoints.
        norm: "rms"; "rms_plus_one", which adds 1 to its weights; or "layer", with mean
            and bias.
        post_norms: whether a second norm follows attention and MLP.
        parallel_residual: whether the MLP reads the input of attention instead of its
            result.
        shared_norm: whether the MLP then reads attention's normalised input, so that
            the layer has one norm; needs ``parallel_residual``.
        qk_norm: whether queries and keys are normalised, head by head, before rope.
        output_bias: whether the o projection has a bias; None for ``attention_bias``.
        attention_scale: factor of the attention scores; None for ``head_dim ** -0.5``.
        attention_softcap: cap of the scores, ``cap * tanh(x / cap)``; None for no cap.
        attention_sinks: whether each head has a sink, a learned score that takes part
            in the softmax.
        logit_softcap: the same for the logits.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated_mlp: whether the MLP is ``down(act(gate(x)) * up(x))`` rather than
            ``down(act(up(x)))``.
        num_experts: number of MLPs per layer that a router chooses from; 0 for a single
            MLP without a router.
        num_experts_per_tok: number of experts that each token uses.
        router_bias: whether the router's logits have a bias.
        swiglu_limit: limit of the gate and of the other factor in a gated MLP, which is
            then ``down((up(x) + 1) * gate(x) * sigmoid(swiglu_alpha * gate(x)))``; None
            for none.
        swiglu_alpha: factor in that sigmoid.
        head_bias: whether the output head has a bias; needs a head that is not tied.
        embedding_scale: factor of the embeddings.
        embedding_norm: whether a norm follows the embedding.
        positions: "rope"; "learned", an embedding of positions; "sinusoidal", waves
            that are added to the embeddings; "alibi", a bias of the scores that is
            linear in the position; or "scaled_alibi", the same as Falcon has it:
            rounded to bfloat16, and scaled like the scores.
        position_offset: row of the embedding, or of the waves, that holds position 0.
        rotary_dim: number of features in each head that are rotated; None for all.
        interleaved_rope: whether rope rotates neighbours, ``(x[2i], x[2i + 1])``,
            instead of the two halves.
        rope_scaling: scaling of the rotary frequencies; None for no scaling.
        local_rope_theta: base, without scaling, for layers with a sliding window; None
            to use the same rope in all layers.
        layers_without_rope: numbers of the layers without rope, from 0.
        sliding_window: number of tokens that a token sees, including itself; None for
            all.
        full_attention_layers: numbers of the layers, from 0, that see all tokens
            despite ``sliding_window``.

    Raises:
        ValueError: a size is not a positive int, or sizes do not fit together.

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
    shared_norm: bool = False
    qk_norm: bool = False
    output_bias: bool | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    logit_softcap: float | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    router_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    head_bias: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    positions: str = "rope"
    position_offset: int = 0
    rotary_dim: int | None = None
    interleaved_rope: bool = False
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
                f"head_dim must be even, because rope rotates pairs of features; got "
                f"{self.head_dim}"
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
        for name, allowed in (
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("positions", POSITIONS),
        ):
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"{name} must be one of {allowed}, got {got!r}")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("shared_norm needs parallel_residual")
        if self.head_bias and self.tie_word_embeddings:
            raise ValueError(
                "head_bias needs a head of its own, and tie_word_embeddings makes the "
                "embedding the head"
            )
        if "alibi" in self.positions and self.sliding_window is not None:
            raise ValueError(
                f"positions {self.positions!r} do not go with a sliding_window, got "
                f"{self.sliding_window}"
            )
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
        """Reads the config that a ``config.json`` describes.

        Args:
            fields: contents of ``config.json``, as transformers 4 or 5 writes it.
                Fields that do not change what the model computes are ignored.

        Raises:
            ValueError: fields are missing or make no sense.
            NotImplementedError: jaxbnb does not have this architecture (the message
                lists those it has), or not this variant of it.

        Example:
            >>> DecoderConfig.from_huggingface(
            ...     {"model_type": "llama", "vocab_size": 256, "hidden_size": 64,
            ...      "intermediate_size": 128, "num_hidden_layers": 2,
            ...      "num_attention_heads": 4}).head_dim
            16
        """
        family = find_family(fields.get("model_type"))
        if family.kind != "decoder":
            raise NotImplementedError(
                f"model_type {fields.get('model_type')!r} is an {family.kind}, which "
                "jaxbnb.load_pretrained loads; what was called takes only decoders"
            )
        return cls(**family.read_config(fields))

    @property
    def num_mlps(self) -> int:
        """Number of MLPs in all layers."""
        return self.num_hidden_layers * max(1, self.num_experts)


# Larger than any model needs, and small enough to allocate arrays of that length.
_MOST_FEATURES: Final = 2**24
_MOST: Final = {
    "num_hidden_layers": 2**14,
    # Positions are int32.
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 2**31 - 1),
}
# Counts that may be 0.
_FROM_ZERO: Final = (
    *("num_experts", "num_experts_per_tok", "position_offset", "image_token_id"),
)


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless ``value`` has the field's type and, if a number, is > 0.

    Counts in ``_FROM_ZERO`` may be 0.
    """
    if value is None and field.default is None:
        return
    if field.type in (int, int | None):
        least = 0 if field.name in _FROM_ZERO else 1
        most = _MOST.get(field.name, _MOST_FEATURES)
        is_good = type(value) is int and least <= value <= most
        want = f"{'a positive int' if least else 'an int from 0'}, at most {most}"
    elif field.type in (float, float | None):
        is_good, want = is_positive(value), "a positive float"
    elif field.type in (bool, bool | None):
        is_good, want = isinstance(value, bool), "True or False"
    elif field.type == tuple[int, ...]:
        is_good = isinstance(value, tuple) and all(type(i) is int for i in value)
        want = "a tuple of ints"
    else:
        kind: Any = field.type if isinstance(field.type, type) else RopeScaling
        is_good, want = isinstance(value, kind), f"a {kind.__name__}"
    if not is_good:
        raise ValueError(f"{field.name} must be {want}, got {value!r:.100}")
