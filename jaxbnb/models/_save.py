"""save_pretrained: writes a model as the folder that transformers would write."""

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
from jaxbnb.core import QuantizedArray
from jaxbnb.core.files import atomic_folder
from jaxbnb.lora import LoraEmbed, LoraLinear, TrainedModule
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._encoder_decoder_config import (
    TIE,
    read_model_config,
    replace_fields,
    untie_fields,
)
from jaxbnb.models._load_plan import Model
from jaxbnb.models._names import find_param_dtype
from jaxbnb.models._places import Place, find_places
from jaxbnb.models._resize import is_resized
from jaxbnb.nnx import surgery


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
) -> Checkpoint:
    """Writes a model's weights, e.g. after `jaxbnb.lora.merge`, for transformers.

    The result is one model.safetensors of floating tensors. A quantised weight is
    decoded to the dtype it had before; other tensors keep their dtype.
    `jaxbnb.convert.convert_checkpoint` can then quantise the folder for bitsandbytes.
    Host memory holds one tensor at a time.

    Args:
        model: model without adapters.
        folder: folder to create; it must be absent or empty. It appears only when it is
            complete.
        source: checkpoint that the model came from. Its config.json and tokenizer are
            copied; after `resize_token_embeddings`, with the new ``vocab_size``.

    Returns:
        The checkpoint in ``folder``, opened.

    Raises:
        ValueError: the model has adapters, or ``source`` belongs to another model.
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
    config = read_model_config(checkpoint.config)
    # A checkpoint may declare embedding and head tied and still store both.
    is_tied = model.config.tie_word_embeddings
    same: dict[str, Any] = {}
    if config.tie_word_embeddings != is_tied:
        same[TIE] = is_tied
    if isinstance(model, CausalLM) and is_resized(model):
        same["vocab_size"] = model.config.vocab_size
    if replace_fields(config, **same) != model.config:
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
        find_param_dtype(variables)
    )
    if config.tie_word_embeddings != is_tied:
        fields = {**untie_fields(fields, model.config), TIE: is_tied}
    if "vocab_size" in same:
        fields = _set_vocab_size(fields, model.config.vocab_size)
    header, starts = layout(infos)
    with atomic_folder(folder) as partial:
        with (partial / WEIGHTS).open("wb", buffering=0) as file:
            write_bytes(file, header)
            for name in starts:
                write_bytes(file, _assemble(places[name], variables))
        write_json(partial / CONFIG, fields)
        carry_tokenizer(checkpoint, partial)
    return open_checkpoint(Path(folder))


def _set_vocab_size(fields: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns the config of a resized model; some families nest it."""
    text = fields.get("text_config")
    if isinstance(text, dict):
        return {**fields, "text_config": {**text, "vocab_size": size}}
    return {**fields, "vocab_size": size}


def _check_layers(model: Model) -> None:
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
