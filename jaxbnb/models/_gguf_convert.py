"""convert_to_gguf: writes a model as a GGUF file, which llama.cpp runs."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxbnb.convert import TensorReport, UnsupportedCheckpointError
from jaxbnb.convert.gguf_files import (
    StoredTensor,
    check_type,
    describe,
    plan_tensors,
    write_gguf,
)
from jaxbnb.convert.gguf_vocabulary import read_vocabulary_fields
from jaxbnb.convert.pieces import Progress
from jaxbnb.convert.plan import DTYPES
from jaxbnb.core.files import check_outside
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._load_plan import LoadPlan, prepare
from jaxbnb.models._rope import RopeScaling, rope_frequencies

# GGUF's architecture of each family.
_ARCHITECTURES: Final = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **dict.fromkeys(("gemma3", "gemma3_text"), "gemma3"),
    **{name: name for name in ("gemma2", "gpt2", "phi3", "qwen2", "qwen3", "smollm3")},
    "bloom": "bloom",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
}
# llama.cpp's numbers for the type of most tensors.
_FILE_TYPES: Final = {
    **{"float32": 0, "float16": 1, "bfloat16": 32},
    **{"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9},
}


def convert_to_gguf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    quant: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> int:
    """Writes a model as a GGUF file, with its tokenizer, for llama.cpp.

    Memory holds one tensor at a time. ``dst`` appears only when it is complete. Before
    anything is written, the metadata is read as `load_pretrained` reads it, and must
    describe the same model.

    Args:
        src: path of anything that `load_pretrained` loads, except for a folder of
            `convert_to_flax`. Quantised weights are decoded, and encoded again.
        dst: file to write. It must not exist.
        quant: type of the matrices, encoded by the gguf package: "q8_0", "q5_1",
            "q5_0", "q4_1" or "q4_0"; None to quantise nothing. With fewer than 8 bits,
            the embedding and the head are in "q8_0". A matrix with rows that are not a
            multiple of 32 is in float16.
        dtype: dtype of matrices without ``quant``: "float32", "float16" or "bfloat16";
            None for the source's, or float32 if it mixes several. Norms and biases are
            always in float32.
        progress: called as ``progress(done_bytes, total_bytes, name)``.
        report: called with the `jaxbnb.convert.TensorReport` of each tensor after it is
            written.

    Returns:
        The number of bytes of the tensors.

    Raises:
        ValueError: ``quant`` or ``dtype`` is not one of these, or ``dst`` is inside
            ``src``.
        UnsupportedCheckpointError: GGUF files of this architecture cannot describe the
            model, or its tokenizer.
        CheckpointError: see `load_pretrained`; or finite values are beyond the range of
            float16.
        FileExistsError: ``dst`` exists.
        ImportError: gguf or tokenizers is not installed.
        OSError: writing failed. Nothing is left behind.

    Example:
        >>> convert_to_gguf("SmolLM2-135M", "m.gguf", quant="q8_0")  # doctest: +SKIP
        143037440
    """
    plan, metadata, tensors, extra = _plan(src, quant, dtype)
    check_outside(src, dst)
    return write_gguf(
        Path(dst),
        metadata,
        tensors,
        extra,
        plan.checkpoint,
        progress=progress,
        report=report,
    )


def plan_to_gguf(
    src: str | os.PathLike[str], *, quant: str | None = None, dtype: str | None = None
) -> list[TensorReport]:
    """Reports what `convert_to_gguf` would do, without reading or writing weights.

    Args:
        src: see `convert_to_gguf`, also for the others and the errors.
        quant: type of the matrices.
        dtype: dtype of matrices without ``quant``.

    Example:
        >>> plan_to_gguf("SmolLM2-135M", quant="q4_0")[0].result  # doctest: +SKIP
        'Q8_0'
    """
    return [tensor.report for tensor in _plan(src, quant, dtype)[2]]


def _plan(
    src: str | os.PathLike[str], quant: str | None, dtype: str | None
) -> tuple[LoadPlan, dict[str, Any], list[StoredTensor], dict[str, np.ndarray]]:
    """Returns the model, the metadata, its tensors, and the factors of rope."""
    if quant is not None:
        check_type(quant)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")
    plan = prepare(src, None, None)
    config, path = plan.config, plan.checkpoint.path
    is_known = config.model_type in _ARCHITECTURES
    if not is_known or not isinstance(config, DecoderConfig):
        raise UnsupportedCheckpointError(
            f"{path} is a {config.model_type!r}; jaxbnb writes GGUF files of "
            f"{', '.join(_ARCHITECTURES)}. llama.cpp's convert_hf_to_gguf.py may write "
            "this one"
        )
    stored = str(np.dtype(plan.variables["model", "embed_tokens", "embedding"].dtype))
    dtype = dtype or stored
    metadata = {
        **_describe_model(config),
        "general.file_type": _FILE_TYPES[quant or dtype],
        "general.quantization_version": 2,
    }
    names = [] if config.tie_word_embeddings else ["output.weight"]
    names += ["blk.0.attn_q.bias"] if config.attention_bias else []
    names += ["blk.0.ffn_up.bias"] if config.mlp_bias else []
    description = describe(metadata, names)
    _check(path, config, DecoderConfig.from_huggingface(description.config))
    metadata |= read_vocabulary_fields(path, config.vocab_size)
    for name in ("bos", "eos"):
        token = plan.checkpoint.config.get(f"{name}_token_id")
        if isinstance(token, int):
            metadata.setdefault(f"tokenizer.ggml.{name}_token_id", token)
    tensors = plan_tensors(plan.checkpoint, description, quant, dtype)
    return plan, metadata, tensors, _list_rope_factors(config)


def _describe_model(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of the architecture, without the tokenizer."""
    name = _ARCHITECTURES[config.model_type]
    is_layer_norm = config.norm == "layer"
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.layer_norm_{'' if is_layer_norm else 'rms_'}epsilon": float(
            config.rms_norm_eps
        ),
    }
    if not is_layer_norm:
        fields["attention.key_length"] = config.head_dim
        fields["attention.value_length"] = config.head_dim
    if config.positions == "rope":
        fields["rope.dimension_count"] = config.rotary_dim or config.head_dim
        fields["rope.freq_base"] = float(config.rope_theta)
        fields |= _describe_scaling(config.rope_scaling)
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
    if config.num_experts:
        fields["expert_count"] = config.num_experts
        fields["expert_used_count"] = config.num_experts_per_tok
    if config.attention_softcap is not None:
        fields["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap is not None:
        fields["final_logit_softcapping"] = float(config.logit_softcap)
    if config.local_rope_theta is not None:
        fields["rope.freq_base_swa"] = float(config.local_rope_theta)
    if name == "gemma3":
        # One layer in so many sees all tokens; with none, more than there are.
        first = min(config.full_attention_layers, default=config.num_hidden_layers)
        fields["attention.sliding_window_pattern"] = first + 1
    if name == "gptneox":
        fields["use_parallel_residual"] = config.parallel_residual
    described = {f"{name}.{key}": value for key, value in fields.items()}
    return {"general.architecture": name, **described}


def _describe_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind == "llama3":
        return {}
    original = scaling.original_max_position_embeddings
    if scaling.kind == "longrope":
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(scaling.attention_factor),
        }
    fields: dict[str, Any] = {
        "rope.scaling.type": scaling.kind,
        "rope.scaling.factor": float(scaling.factor),
    }
    if scaling.kind == "yarn":
        fields |= {
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    return fields


def _list_rope_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns the divisors of frequencies, which files have as tensors."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(scaling.long_factor, np.float32),
            "rope_factors_short.weight": np.array(scaling.short_factor, np.float32),
        }
    if scaling is not None and scaling.kind == "llama3":
        dim = config.rotary_dim or config.head_dim
        plain, scaled = (
            np.asarray(rope_frequencies(dim, config.rope_theta, each), np.float64)
            for each in (None, scaling)
        )
        return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    return {}


def _check(path: Path, want: DecoderConfig, got: DecoderConfig) -> None:
    """Raises UnsupportedCheckpointError if a file would describe another model."""
    # Mistral is Llama, if it has no window.
    same: dict[str, Any] = {"model_type": want.model_type}
    scaling = want.rope_scaling
    if scaling is not None and scaling.kind in ("llama3", "longrope"):
        # Its factors are tensors.
        same["rope_scaling"] = scaling
    got = dataclasses.replace(got, **same)
    other = [
        f"{field.name} {getattr(want, field.name)!r} as {getattr(got, field.name)!r}"
        for field in dataclasses.fields(want)
        if getattr(want, field.name) != getattr(got, field.name)
    ]
    if other:
        raise UnsupportedCheckpointError(
            f"{path}: GGUF files of this architecture cannot describe the model; they "
            f"would give {', '.join(other)}"
        )
