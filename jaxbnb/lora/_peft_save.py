"""save_adapter: an adapter as PEFT's files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.lora._layer import DEFAULT
from jaxbnb.lora._peft_config import make_fields, make_fields_in_files
from jaxbnb.lora._peft_fused import join
from jaxbnb.lora._targets import Adapted, adapter_names, find_adapted, find_linears
from jaxbnb.lora.file_names import (
    CONFIG_FILE,
    PREFIX,
    SUMMANDS,
    WEIGHTS_FILE,
    Piece,
    find_file_layers,
    is_plain,
)


def save_adapter(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    base_model_name_or_path: str | None = None,
) -> None:
    """Saves an adapter of ``model`` as PEFT does.

    ``adapter_model.safetensors`` holds, for each adapted layer,
    ``base_model.model.<path>.lora_A.weight`` ``(r, in)`` and ``.lora_B.weight``
    ``(out, r)``, and with DoRA ``.lora_magnitude_vector`` ``(out,)``; the layers of a
    `jaxbnb.nnx.LayerStack` are numbered. Each file appears complete or not at all.

    Of a layer over other axes, such as ``nnx.LinearGeneral``, these are of the matrix
    that `LoraAdapter` describes, which is the weight that a PyTorch model has for it.
    PEFT has no such files for a layer of several kernels, e.g. of experts: there the
    tensors have the axes of ``batch`` in front, which `load_adapter` takes and PEFT
    does not.

    An adapter that started from the weight ("pissa", "olora", "loftq") is for the model
    as it was before: whoever loads it, here or in PEFT, takes the same out of it again.
    (PEFT 0.21 quantises for "loftq" on a GPU only, and starts without dividing by the
    scale; the base comes out the same.)

    A `jaxbnb.models.CausalLM` has its adapters saved under the names of its family.
    Where those have several layers in one, as GPT-2's ``c_attn`` is q, k and v, the
    adapters of these are saved as one whose rank is the sum of theirs, which PEFT
    applies to the same effect, and `load_adapter` takes apart again.

    Args:
        model: a model after `add_adapter`.
        folder: made if it is not there; files of these names in it are replaced.
        name: of the adapter.
        base_model_name_or_path: recorded for PEFT, which can load the base model by it.

    Raises:
        ValueError: the model has no adapter of this name, or its layers are stacked
            otherwise than in a `jaxbnb.nnx.LayerStack`, and have no names; or a fused
            layer has DoRA in part of it, or an adapter that started from its weight.
        OSError: writing failed, e.g. on a full disk.

    Example:
        >>> import json, pathlib, tempfile, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> config = jaxbnb.lora.LoraConfig(r=4)
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> jaxbnb.lora.save_adapter(model, folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    safetensors = import_extra(
        "safetensors.numpy", needed_by="jaxbnb.lora.save_adapter", extra="convert"
    )
    layers = list(find_adapted(model, name))
    if not layers:
        existing = adapter_names(model)
        raise ValueError(
            f"{type(model).__name__} has no adapter {name!r} to save, it has "
            f"{existing}; add_adapter makes them"
            if existing
            else f"{type(model).__name__} has no adapters to save; add_adapter makes "
            "them"
        )
    pieces = []
    for linear in layers:
        if len(set(linear.names)) != len(linear.names):
            raise ValueError(
                f"{linear.path} is a stack of {len(linear.names)} layers outside a "
                "LayerStack, which have no names in PEFT's files"
            )
        pieces += _make_pieces(linear, name)
    fields, metadata = make_fields(model, layers, name), {"format": "pt"}
    every = [each for linear in find_linears(model) for each in linear.names]
    in_files = find_file_layers(model, every)
    if not is_plain(in_files):
        config = layers[0].layer.adapters[name].config
        joined, summands = join(pieces, in_files, config)
        pieces = list(joined.values())
        fields |= make_fields_in_files(model, joined, in_files, config)
        # PEFT leaves it alone.
        metadata[SUMMANDS] = json.dumps(summands)
    tensors = {
        f"{PREFIX}{piece.name}.{kind}": value
        for piece in pieces
        for kind, value in piece.tensors.items()
    }
    fields["base_model_name_or_path"] = base_model_name_or_path
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_FILE) as config_path:
        text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
        config_path.write_text(text)
        with atomic_write(folder / WEIGHTS_FILE) as path:
            path.write_bytes(safetensors.save(tensors, metadata=metadata))
            # From here on, a kill leaves a folder that does not load, rather than one
            # adapter's weights with another one's configuration.
            (folder / CONFIG_FILE).unlink(missing_ok=True)


def _make_pieces(linear: Adapted, name: str) -> Iterator[Piece]:
    """The adapter of each layer of a stack that has one, as PEFT names it."""
    adapter = linear.layer.adapters[name]
    stacked = {"lora_A.weight": adapter.lora_a, "lora_B.weight": adapter.lora_b}
    if adapter.magnitude is not None:
        stacked["lora_magnitude_vector"] = adapter.magnitude
    unstacked = {}
    for kind, parameter in stacked.items():
        rank = len(adapter.scale.shape)
        value = np.asarray(parameter[...])
        unstacked[kind] = value.reshape(-1, *value.shape[rank:])
    scales = np.ravel(adapter.scale[...])
    for i, (each, rank) in enumerate(zip(linear.names, adapter.ranks, strict=True)):
        values = {}
        for kind, value in unstacked.items():
            axis = {"lora_A.weight": -1, "lora_B.weight": -2}.get(kind)
            one = value[i]
            if axis is not None:
                one = np.take(one, range(rank), axis).swapaxes(-1, -2)
            values[kind] = np.ascontiguousarray(one)
        if rank:
            yield Piece(each, values, float(scales[i]))
