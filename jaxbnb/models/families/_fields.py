"""Reads fields of config.json that several families have in common."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.models._rope import ROPE_KINDS, RopeScaling, check_positive

_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Larger than any model's vocabulary, and than its number of layers. Layers are
# enumerated, so their limit is lower.
_MAX_SIZE: Final = 2**24
_MAX_LAYERS: Final = 2**14


def read_llama_like(
    fields: Mapping[str, Any],
    *,
    act: tuple[str, str] = ("hidden_act", "silu"),
    **changes: Any,
) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` for a family with Llama's field names.

    Args:
        fields: contents of ``config.json``.
        act: name of the activation's field, and its default.
        **changes: fields of the config that differ from a Llama's or are read in
            another way, e.g. the result of `read_rope`.
    """
    require(fields, *_SIZES)
    heads, head_dim = fields["num_attention_heads"], fields.get("head_dim")
    if head_dim is None:
        head_dim = divide(fields["hidden_size"], heads)
    if "rope_theta" not in changes:
        changes |= read_rope(fields, head_dim)
    values = {
        "num_key_value_heads": get(fields, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "model_type": fields["model_type"],
        "activation": read_activation(fields, *act),
        # These are transformers' defaults, for fields that older files leave out.
        "rms_norm_eps": get(fields, "rms_norm_eps", 1e-6),
        "max_position_embeddings": get(fields, "max_position_embeddings", 2048),
        "tie_word_embeddings": get(fields, "tie_word_embeddings", False),
    }
    values |= {name: fields[name] for name in _SIZES} | changes
    scaling, original = values["rope_scaling"], values["max_position_embeddings"]
    if scaling is not None and scaling.kind == "dynamic":
        values |= _stretch_positions(scaling, original)
    return values


def read_gpt2_like(fields: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` for a family with GPT-2's field names.

    Args:
        fields: contents of ``config.json``.
        **changes: fields of the config that differ from a GPT-2's.
    """
    require(fields, "vocab_size", "n_embd", "n_layer", "n_head")
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["n_embd"],
        "intermediate_size": get(fields, "n_inner", 4 * fields["n_embd"]),
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": fields["n_head"],
        "num_key_value_heads": fields["n_head"],
        "head_dim": divide(fields["n_embd"], fields["n_head"]),
        "rms_norm_eps": get(fields, "layer_norm_epsilon", 1e-5),
        "max_position_embeddings": get(fields, "n_positions", 1024),
        "tie_word_embeddings": get(fields, "tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
        "model_type": fields["model_type"],
        "norm": "layer",
        "activation": read_activation(fields, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "positions": "learned",
        **changes,
    }


def _stretch_positions(scaling: RopeScaling, original: Any) -> dict[str, Any]:
    """Returns the fields that "dynamic" rope changes.

    transformers sets no limit. But quality falls with the length, and the model's
    authors went as far as ``factor``.
    """
    _check_int("max_position_embeddings", original)
    scaling = dataclasses.replace(scaling, original_max_position_embeddings=original)
    positions = max(original, int(original * scaling.factor))
    return {"rope_scaling": scaling, "max_position_embeddings": positions}


def require(fields: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError unless all these fields exist and are sizes."""
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        kind = fields.get("model_type")
        raise ValueError(f"the config of a {kind} lacks {missing}; it has {[*fields]}")
    for name in names:
        read_size(fields, name, None)


def read_size(fields: Mapping[str, Any], name: str, default: int | None) -> int:
    """Reads a positive int, or the default if the field is absent or null."""
    value = get(fields, name, default)
    _check_int(name, value)
    most = _MAX_LAYERS if name.endswith(("num_hidden_layers", "n_layer")) else _MAX_SIZE
    if value > most:
        raise ValueError(
            f"{name} is {value!r:.100}, more than {most}; is the config damaged?"
        )
    return value


def _check_int(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r:.100}")


def rename(fields: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Adds fields under other names, which keep their own if theirs are absent.

    Example:
        >>> rename({"n_layer": 3, "hidden_size": 8}, num_hidden_layers="n_layer",
        ...        hidden_size="n_embed")
        {'n_layer': 3, 'hidden_size': 8, 'num_hidden_layers': 3}
    """
    added = {new: get(fields, old, fields.get(new)) for new, old in names.items()}
    return {**fields, **added}


def get(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a field, or the default if it is absent or null."""
    value = fields.get(name)
    return default if value is None else value


def refuse(fields: Mapping[str, Any], **allowed: Any) -> None:
    """Raises NotImplementedError if a field differs from its allowed value."""
    for name, value in allowed.items():
        got = get(fields, name, value)
        if got != value:
            raise NotImplementedError(
                f"{name} {got!r} is not implemented for {fields.get('model_type')!r}; "
                f"jaxbnb has {value!r}"
            )


def read_activation(fields: Mapping[str, Any], name: str, default: str) -> str:
    """Returns our name for an activation."""
    got = get(fields, name, default)
    if not isinstance(got, str) or got not in _ACTIVATIONS:
        raise NotImplementedError(
            f"{name} {got!r} is not implemented; jaxbnb has {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[got]


def divide(hidden_size: Any, heads: Any) -> int:
    """Returns the features per head, if the config does not say."""
    ints = isinstance(hidden_size, int) and isinstance(heads, int)
    if not ints or heads < 1 or hidden_size % heads:
        raise ValueError(
            f"without head_dim, hidden_size must be a multiple of num_attention_heads; "
            f"got {hidden_size!r} and {heads!r}"
        )
    return hidden_size // heads


def read_layer_types(
    fields: Mapping[str, Any], is_full: list[bool]
) -> dict[str, tuple[int, ...]]:
    """Finds the layers without a sliding window.

    Args:
        fields: contents of ``config.json``; files of transformers since 4.53 have
            ``layer_types``.
        is_full: default if ``layer_types`` is absent: whether each layer lacks a
            window.
    """
    types = fields.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != len(is_full):
            raise ValueError(
                f"layer_types must be a list of {len(is_full)}, got {types!r}"
            )
        foreign = sorted({str(kind) for kind in types if kind not in known})
        if foreign:
            raise NotImplementedError(
                f"layer_types {foreign} are not implemented; jaxbnb has {known}"
            )
        is_full = [kind == "full_attention" for kind in types]
    return {"full_attention_layers": tuple(i for i, full in enumerate(is_full) if full)}


def read_rope(
    fields: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    part: float | None = None,
    rope: Any = None,
) -> dict[str, Any]:
    """Reads base, scaling and rotated part of rope, from transformers 4 or 5.

    Args:
        fields: contents of ``config.json``.
        head_dim: features per head.
        theta: default of the base.
        part: default of the part of each head that is rotated; None for a family that
            always rotates all of it.
        rope: the object that describes rope; None for ``rope_scaling`` or
            ``rope_parameters`` of ``fields``.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = get(fields, name, {}) if rope is None else rope
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} must be an object or null, got {rope!r}")
    kind = get(rope, "rope_type", get(rope, "type", "default"))
    kind = "longrope" if kind == "su" else kind
    scaling = None
    if kind in ROPE_KINDS:
        scaling = _read_scaling(fields, rope, kind)
    elif kind != "default":
        raise NotImplementedError(
            f"{name} of type {kind!r} is not implemented; jaxbnb has 'default' "
            f"(unscaled) rope and {ROPE_KINDS}"
        )
    rotated = get(rope, "partial_rotary_factor", fields.get("partial_rotary_factor"))
    rotated = (1.0 if part is None else part) if rotated is None else rotated
    if part is None and rotated != 1.0:
        raise NotImplementedError(
            f"{name} rotates {rotated!r} of each head, which is not implemented for "
            f"{fields.get('model_type')!r}; jaxbnb rotates all of it"
        )
    check_positive("the part of each head that is rotated", rotated)
    check_positive("head_dim", head_dim)
    return {
        "rope_theta": get(rope, "rope_theta", get(fields, "rope_theta", theta)),
        "rope_scaling": scaling,
        "rotary_dim": None if part is None else int(head_dim * rotated),
    }


def _read_scaling(
    fields: Mapping[str, Any], rope: Mapping[str, Any], kind: str
) -> RopeScaling:
    def number(name: str, default: Any = None) -> Any:
        value = get(rope, name, default)
        check_positive(f"{name} of rope of type {kind!r}", value)
        return value

    def factors(name: str) -> tuple[float, ...]:
        value = get(rope, name, [])
        if not isinstance(value, list):
            raise ValueError(f"{name} of rope must be a list, got {value!r}")
        return tuple(value)

    # For "dynamic", read_llama_like adds the original length.
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, number("factor"))
    longest = get(fields, "max_position_embeddings", 2048)
    # Phi-3 has it next to rope_scaling, and transformers looks there first.
    original = get(
        fields,
        "original_max_position_embeddings",
        get(rope, "original_max_position_embeddings", longest),
    )
    check_positive("original_max_position_embeddings", original)
    check_positive("max_position_embeddings", longest)
    if kind == "llama3":
        return RopeScaling(
            kind,
            number("factor"),
            original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    factor = number("factor", longest / original)
    if kind == "longrope":
        if original < 2:
            raise ValueError(
                "original_max_position_embeddings of rope of type 'longrope' must be "
                f"at least 2, because its logarithm is a divisor; got {original}"
            )
        attention = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        return RopeScaling(
            kind,
            original_max_position_embeddings=original,
            short_factor=factors("short_factor"),
            long_factor=factors("long_factor"),
            attention_factor=number("attention_factor", attention),
        )

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1)) + 1.0

    attention = magnitude(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = magnitude(number("mscale")) / magnitude(number("mscale_all_dim"))
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(get(rope, "truncate", True)),
        attention_factor=number("attention_factor", attention),
    )
