"""A Llama in a GGUF file, presented as Hugging Face would: config, names, rows."""

import functools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Shaped, UInt8

from jaxbnb.convert import _gguf
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
)

_MODEL_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def open_llama(path: Path) -> Checkpoint:
    """Opens a GGUF file of the Llama architecture.

    Raises:
        CheckpointError: no GGUF, a truncated or corrupt one, or one whose tensors are
            not those of the model that its metadata describes.
        UnsupportedCheckpointError: another architecture, rope scaling, experts, a file
            that is one of several, or a quantisation type that we do not decode.
    """
    gguf = _gguf.read_gguf(path)
    config = llama_config(gguf)
    names = _hugging_face_names(gguf, config)
    tensors = {
        name: TensorInfo(gguf.tensors[stored].shape, gguf.tensors[stored].block.dtype)
        for name, stored in names.items()
    }
    _check_shapes(path, config, tensors)
    encodings = {
        name: (gguf.tensors[stored].block.name, gguf.tensors[stored].nbytes)
        for name, stored in names.items()
        if gguf.tensors[stored].block.size > 1
    }
    return Checkpoint(
        path=path,
        config=config,
        tensors=types.MappingProxyType(tensors),
        reader=functools.partial(_read, gguf, config, names),
        encodings=types.MappingProxyType(encodings),
    )


def llama_config(gguf: _gguf.Gguf) -> dict[str, Any]:
    """The ``config.json`` that Hugging Face would have beside these weights."""
    field = functools.partial(_field, gguf)
    architecture = field("general.architecture", str)
    if architecture != "llama":
        raise UnsupportedCheckpointError(
            f"{gguf.path} holds the architecture {architecture!r}; of GGUF files "
            "jaxbnb reads 'llama' alone. Convert its safetensors folder instead"
        )
    scaling = field("llama.rope.scaling.type", str, "none")
    for key, got, allowed in (
        ("llama.rope.scaling.type", scaling, "none"),
        ("llama.expert_count", field("llama.expert_count", int, 0), 0),
        ("split.count", max(1, field("split.count", int, 1)), 1),
    ):
        if got != allowed:
            raise UnsupportedCheckpointError(
                f"{gguf.path} has {key} {got!r}; jaxbnb reads {allowed!r} alone. "
                "Convert its safetensors folder instead"
            )
    hidden_size = _size(gguf, "llama.embedding_length")
    heads = _size(gguf, "llama.attention.head_count")
    rope = _size(gguf, "llama.rope.dimension_count", max(1, hidden_size // heads))
    head_dim = _size(gguf, "llama.attention.key_length", rope)
    if rope != head_dim or head_dim % 2:
        raise UnsupportedCheckpointError(
            f"{gguf.path} rotates {rope} of {head_dim} dimensions a head; jaxbnb reads "
            "files that rotate all of an even number"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": _size(gguf, "llama.feed_forward_length"),
        "num_hidden_layers": _size(gguf, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(gguf, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _size(
            gguf, "llama.vocab_size", embedding.shape[0] if embedding else None
        ),
        "max_position_embeddings": _size(gguf, "llama.context_length"),
        "rope_theta": _positive(gguf, "llama.rope.freq_base", 10000.0),
        "rms_norm_eps": _positive(gguf, "llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": embedding.block.dtype.name if embedding else "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = field(f"tokenizer.ggml.{key}_token_id", int, -1)
        config[f"{name}_token_id"] = token if token >= 0 else None
    return config


def interleaved_to_halves(
    rows: Shaped[np.ndarray, "rows n"], heads: int
) -> Shaped[np.ndarray, "rows n"]:
    """Undoes GGUF's order of the rows of queries and keys.

    Rope rotates pairs of dimensions of a head. Hugging Face pairs i with i + d/2, GGUF
    has the two of a pair side by side, as 2 i and 2 i + 1.

    Args:
        rows: a weight's rows, in values or in stored bytes.
        heads: among which the rows are divided.

    Example:
        >>> interleaved_to_halves(np.arange(8)[:, None], heads=2)[:, 0].tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _read(
    gguf: _gguf.Gguf, config: dict[str, Any], names: dict[str, str], name: str
) -> np.ndarray:
    stored = names[name]
    # Rows are reordered while they are few bytes: a row is a whole number of blocks.
    rows: UInt8[np.ndarray, "rows row_bytes"] = _gguf.read_rows(gguf, stored)
    if stored.endswith(".attn_q.weight"):
        rows = interleaved_to_halves(rows, config["num_attention_heads"])
    elif stored.endswith(".attn_k.weight"):
        rows = interleaved_to_halves(rows, config["num_key_value_heads"])
    tensor = gguf.tensors[stored]
    return tensor.block.decode(rows).reshape(tensor.shape)


def _hugging_face_names(gguf: _gguf.Gguf, config: dict[str, Any]) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, in the order of the file."""
    known = dict(_MODEL_NAMES)
    # The count is the file's word; its tensors bound the work it can cause.
    for layer in range(min(config["num_hidden_layers"], len(gguf.tensors))):
        for name, ours in _LAYER_NAMES.items():
            known[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{ours}"
    foreign = [name for name in gguf.tensors if name not in known]
    if foreign:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has tensors that are no part of a plain Llama of "
            f"{config['num_hidden_layers']} layers: {foreign[:5]} ({len(foreign)} in "
            "all). Convert its safetensors folder instead"
        )
    return {known[name]: name for name in gguf.tensors}


def _check_shapes(
    path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> None:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    per_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    vocabulary = (config["vocab_size"], hidden)
    expected = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = vocabulary
    for layer in range(config["num_hidden_layers"]):
        for name, shape in per_layer.items():
            expected[f"model.layers.{layer}.{name}.weight"] = shape
        # At the first layer that is not all there we know enough.
        if len(expected) > len(tensors):
            break
    for name, shape in expected.items():
        if name not in tensors:
            raise MissingTensorError(
                f"{path} describes {config['num_hidden_layers']} layers but has no "
                f"tensor for {name!r} among its {len(tensors)}; download it again"
            )
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tensors[name].shape}; the metadata wants "
                f"{shape}; the file is corrupt"
            )


_REQUIRED: Final = object()


def _field(gguf: _gguf.Gguf, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = gguf.metadata.get(key, default)
    if value is _REQUIRED:
        raise CheckpointError(
            f"{gguf.path} lacks the metadata {key!r} among its {len(gguf.metadata)} "
            "fields; is it a vocabulary without a model, or an adapter?"
        )
    if type(value) is not kind:
        raise CheckpointError(
            f"{gguf.path}: metadata {key!r} should be of type {kind.__name__}, "
            f"got {str(value)[:60]!r}"
        )
    return value


def _size(gguf: _gguf.Gguf, key: str, default: Any = None) -> int:
    """A positive int."""
    value = _field(gguf, key, int, _REQUIRED if default is None else default)
    return _checked(gguf, key, value, lambda n: 0 < n <= 2**40)


def _positive(gguf: _gguf.Gguf, key: str, default: Any = _REQUIRED) -> float:
    """A positive float, as the decimal that its float32 was meant to be (1e-05)."""
    value = _field(gguf, key, float, default)
    with np.errstate(over="ignore"):
        value = float(str(np.float32(value)))
    return _checked(gguf, key, value, lambda x: 0 < x < math.inf)


def _checked(
    gguf: _gguf.Gguf, key: str, value: Any, allowed: Callable[[Any], bool]
) -> Any:
    if not allowed(value):
        raise CheckpointError(f"{gguf.path}: metadata {key!r} cannot be {value!r}")
    return value
