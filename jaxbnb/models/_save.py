"""save_pretrained: writes a model as the folder that transformers would write."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxbnb.convert import Checkpoint, TensorInfo, open_checkpoint
from jaxbnb.convert.huggingface_folder import CONFIG, WEIGHTS
from jaxbnb.convert.json_files import write_json
from jaxbnb.convert.safetensors_files import layout, write_bytes
from jaxbnb.convert.tokenizer_files import carry_tokenizer
from jaxbnb.convert.writers import Writer, find_writer
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.files import atomic_folder
from jaxbnb.lora import LoraEmbed, LoraLinear, TrainedModule
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._places import Place, find_places
from jaxbnb.models._resize import is_resized
from jaxbnb.models._tied import TIE
from jaxbnb.models.tensors import join_parts
from jaxbnb.nnx import QuantLinear, QuantParam, surgery


def save_pretrained(
    model: CausalLM,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    to: str | None = None,
) -> Checkpoint:
    """Writes a model's weights, e.g. after `jaxbnb.lora.merge`, for transformers.

    The result is one model.safetensors. Without ``to``, a quantised weight is decoded
    to the dtype it had before; other tensors keep their dtype. With it, the weights of
    quantised linear layers are written as they are, and a quantised embedding is
    decoded. `jaxbnb.convert.convert_checkpoint` can quantise a folder later. Host
    memory holds one tensor at a time.

    Args:
        model: model without adapters.
        folder: folder to create; it must be absent or empty. It appears only when it is
            complete.
        source: checkpoint that the model came from. Its config.json and tokenizer are
            copied; after `resize_token_embeddings`, with the new ``vocab_size``.
        to: library that loads the quantised layers, "bitsandbytes" or
            "compressed-tensors"; see `jaxbnb.convert.convert_checkpoint` for their
            formats. None to decode them.

    Returns:
        The checkpoint in ``folder``, opened.

    Raises:
        ValueError: the model has adapters, or ``source`` belongs to another model. Or
            the library ``to`` does not have the format of the layers, these have
            several formats, or none is quantised.
        FileExistsError: ``folder`` exists.
        OSError: writing failed. Nothing is left behind.

    Example:
        >>> model = load_pretrained("SmolLM2-135M", quant="nf4")  # doctest: +SKIP
        >>> jaxbnb.lora.load_adapter(model, "adapter")  # doctest: +SKIP
        >>> jaxbnb.lora.merge(model)  # doctest: +SKIP
        >>> save_pretrained(model, "merged", source="SmolLM2-135M")  # doctest: +SKIP
        Checkpoint('merged', 'llama', 272 tensors, 269.1 MB)
    """
    checkpoint = open_checkpoint(source)
    config = DecoderConfig.from_huggingface(checkpoint.config)
    # A checkpoint may declare embedding and head tied and still store both.
    is_tied = model.config.tie_word_embeddings
    same: dict[str, Any] = {"tie_word_embeddings": is_tied}
    if is_resized(model):
        same["vocab_size"] = model.config.vocab_size
    if dataclasses.replace(config, **same) != model.config:
        raise ValueError(
            f"{checkpoint.path} belongs to another model: {config}, and this one is "
            f"{model.config}"
        )
    _check_layers(model)
    variables: dict[Any, nnx.Variable] = dict(nnx.to_flat_state(nnx.state(model)))
    places = find_places(variables, model.config)
    infos = {
        name: TensorInfo(where[0].shape, _get_dtype(variables[where[0].path]))
        for name, where in places.items()
    }
    fields = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    fields["dtype" if "dtype" in fields else "torch_dtype"] = str(
        np.dtype(model.model.embed_tokens.embedding.get_value().dtype)
    )
    if config.tie_word_embeddings != is_tied:
        fields[TIE] = is_tied
    if config.vocab_size != model.config.vocab_size:
        fields = _set_vocab_size(fields, model.config.vocab_size)
    writer = None if to is None else find_writer(to)
    stored: dict[str, dict[str, TensorInfo]] = {name: {} for name in infos}
    if writer is not None:
        quant = _find_format(model, writer)
        kernels = {
            name
            for name, where in places.items()
            if where[0].is_kernel and isinstance(variables[where[0].path], QuantParam)
        }
        stored |= {n: writer.plan_arrays(n, infos[n], quant) for n in kernels}
        skip = [n for n, info in infos.items() if len(info.shape) == 2]
        skip = [n.removesuffix(".weight") for n in skip if n not in kernels]
        fields["quantization_config"] = writer.make_config(
            quant, sorted({"lm_head", *skip})
        )
    parts = {n: arrays or {n: infos[n]} for n, arrays in stored.items()}
    header, starts = layout(
        {k: v for group in parts.values() for k, v in group.items()}
    )
    with atomic_folder(folder) as partial:
        with (partial / WEIGHTS).open("wb", buffering=0) as file:
            write_bytes(file, header)
            for name, group in parts.items():
                if writer is not None and stored[name]:
                    q = join_parts(places[name], variables)
                    arrays = writer.make_arrays(name, q)
                else:
                    arrays = {name: _assemble(places[name], variables)}
                for part in group:
                    file.seek(starts[part])
                    write_bytes(file, arrays[part])
        write_json(partial / CONFIG, fields)
        carry_tokenizer(checkpoint, partial)
    return open_checkpoint(Path(folder))


def _find_format(model: CausalLM, writer: Writer) -> QuantConfig:
    """Returns the one format of the quantised linear layers.

    Raises:
        ValueError: there are several formats or none, or the library lacks the format,
            or it needs weights transposed.
    """
    formats = {
        dataclasses.replace(module.config, compute_dtype=None)
        for _, module in nnx.iter_modules(model)
        if isinstance(module, QuantLinear)
    }
    if len(formats) != 1:
        got = sorted(config.quant_type for config in formats)
        raise ValueError(
            f"to={writer.name!r} writes linear layers of one format; this model's are "
            f"{got or 'not quantised'}. Leave out to, and quantise what it writes with "
            "jaxbnb.convert.convert_checkpoint"
        )
    if model.is_transposed_in_files():
        raise ValueError(
            f"{writer.name} needs the weights of a {model.config.model_type} "
            "transposed, and jaxbnb does not write these; leave out to"
        )
    (quant,) = formats
    writer.make_config(quant, ())
    dtype = np.dtype(model.model.embed_tokens.embedding.get_value().dtype)
    return dataclasses.replace(quant, compute_dtype=dtype)


def _set_vocab_size(fields: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns the config of a resized model; some families nest it."""
    text = fields.get("text_config")
    if isinstance(text, dict):
        return {**fields, "text_config": {**text, "vocab_size": size}}
    return {**fields, "vocab_size": size}


def _check_layers(model: CausalLM) -> None:
    """Raises ValueError for adapters, which the files cannot hold."""
    for path, _, _, module in surgery.iter_children(model):
        if isinstance(module, LoraEmbed | LoraLinear | TrainedModule):
            raise ValueError(
                f"{path} has adapters; merge them first with jaxbnb.lora.merge, or "
                "save them separately with jaxbnb.lora.save_adapter"
            )


def _get_dtype(variable: nnx.Variable) -> np.dtype:
    return np.dtype(variable.get_value().dtype)


def _assemble(places: list[Place], variables: dict[Any, nnx.Variable]) -> np.ndarray:
    """Puts together the tensor that `Place.part` takes apart."""
    whole = np.empty(places[0].shape, _get_dtype(variables[places[0].path]))
    for place in places:
        value: Any = variables[place.path].get_value()[place.index]
        if isinstance(value, QuantizedArray):
            value = value.dequantize()
        value = np.asarray(value).T if place.is_kernel else np.asarray(value)
        rows = whole.T if place.is_flipped else whole
        rows[... if place.rows is None else place.rows] = value
    return whole
