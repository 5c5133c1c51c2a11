"""save_pretrained: writes a model as the folder that transformers would write."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxbnb.convert import Checkpoint, TensorInfo, open_checkpoint
from jaxbnb.convert.huggingface_folder import CONFIG, INDEX, SHARD, WEIGHTS
from jaxbnb.convert.json_files import write_json
from jaxbnb.convert.safetensors_files import layout, write_file
from jaxbnb.convert.tokenizer_files import carry_tokenizer
from jaxbnb.core import QuantizedArray
from jaxbnb.core.processes import fetch, on_first, raise_together, shared_folder
from jaxbnb.lora import LoraEmbed, LoraLinear, TrainedModule
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._encoder_decoder_config import (
    TIE,
    read_model_config,
    replace_fields,
)
from jaxbnb.models._load_plan import Model
from jaxbnb.models._names import find_param_dtype
from jaxbnb.models._places import Place, find_places
from jaxbnb.models._resize import is_resized
from jaxbnb.models._save_stored import plan_stored
from jaxbnb.models._tied import tie_like
from jaxbnb.nnx import surgery


def save_pretrained(
    model: Model,
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

    Under `jax.distributed`, all processes call this. Each helps to gather the tensors
    and writes a part of them as a file of its own, such as
    model-00001-of-00004.safetensors, with an index. The folder appears once all are
    complete.

    Args:
        model: model without adapters.
        folder: folder to create, shared by all processes; it must be absent or empty.
            It appears only when it is complete.
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
        ProcessError: another process failed, or the folder is not shared.

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
    fields = tie_like(fields, model.config)
    if "vocab_size" in same:
        fields = _set_vocab_size(fields, same["vocab_size"])

    arrays = {name: {name: info} for name, info in infos.items()}
    stored = None
    if to is not None:
        dtype = find_param_dtype(variables)
        stored = plan_stored(model, variables, places, infos, dtype, to)
        arrays |= stored.infos
        fields["quantization_config"] = stored.config
    owners = {array: name for name, group in arrays.items() for array in group}

    def assemble(array: str) -> np.ndarray:
        name = owners[array]
        if stored is not None and name in stored.infos:
            return stored.read(name)[array]
        return _assemble(places[name], variables)

    def write_others(partial: Path) -> None:
        write_json(partial / CONFIG, fields)
        carry_tokenizer(checkpoint, partial)

    with shared_folder(folder) as partial:
        planned = {k: info for group in arrays.values() for k, info in group.items()}
        _write_weights(partial, planned, assemble)
        on_first(f"writing {folder}", lambda: write_others(partial))
    return open_checkpoint(Path(folder))


def _write_weights(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    assemble: Callable[[str], np.ndarray],
) -> None:
    """Writes one file, or one from each process and an index.

    Args:
        folder: folder to write to.
        infos: shapes and dtypes of the tensors.
        assemble: function that returns a tensor, with the help of all processes.
    """
    groups = _divide(infos, jax.process_count())
    if len(groups) == 1:
        files = [WEIGHTS]
    else:
        numbers = range(1, len(groups) + 1)
        files = [SHARD.format(number, len(groups)) for number in numbers]
    for number, (group, name) in enumerate(zip(groups, files, strict=True)):
        header, starts = layout({tensor: infos[tensor] for tensor in group})
        is_ours = number == jax.process_index()
        tensors = map(assemble, starts)
        error = write_file(folder / name, header, tensors) if is_ours else None
        # All tensors are assembled in all processes, even if writing has failed.
        for _ in tensors:
            pass
        raise_together(f"writing {name}", error)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
            "weight_map": {
                tensor: name
                for group, name in zip(groups, files, strict=True)
                for tensor in group
            },
        }
        on_first(f"writing {INDEX}", lambda: write_json(folder / INDEX, index))


def _divide(infos: Mapping[str, TensorInfo], count: int) -> list[list[str]]:
    """Divides tensors, in their order, into at most ``count`` groups of similar size.

    Example:
        >>> infos = {name: TensorInfo((1,), np.dtype("int8")) for name in "abcde"}
        >>> _divide(infos, 2)
        [['a', 'b', 'c'], ['d', 'e']]
    """
    total, before = max(1, sum(info.nbytes for info in infos.values())), 0
    groups: list[list[str]] = [[] for _ in range(count)]
    for name, info in infos.items():
        # By its middle, so that a tensor across a border goes where most of it is.
        middle = 2 * before + info.nbytes
        groups[min(count - 1, middle * count // (2 * total + 1))].append(name)
        before += info.nbytes
    return [group for group in groups if group]


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
        value = place.flip(fetch(value)) if place.is_kernel else fetch(value)
        rows = whole.mT if place.is_flipped else whole
        rows[place.at] = value
    return whole
