"""save_adapter: writes an adapter as PEFT's files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.core.processes import check_shared, fetch, on_first
from jaxbnb.lora._embed import LoraEmbed
from jaxbnb.lora._layer import DEFAULT
from jaxbnb.lora._peft_config import make_fields, make_fields_in_files
from jaxbnb.lora._peft_fused import join
from jaxbnb.lora._peft_trained import (
    make_base_tensors,
    make_tensors,
    make_trained_fields,
)
from jaxbnb.lora._targets import Adapted, adapter_names, find_adapted, find_linears
from jaxbnb.lora.file_names import (
    CONFIG_FILE,
    EMBED_A,
    EMBED_B,
    MAGNITUDE,
    PREFIX,
    SUMMANDS,
    WEIGHTS_FILE,
    A,
    B,
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
    save_embedding_layers: bool = True,
) -> None:
    """Saves an adapter of ``model`` in PEFT's format.

    For each adapted layer, ``adapter_model.safetensors`` holds
    ``base_model.model.<path>.lora_A.weight`` ``(r, in)`` and ``.lora_B.weight``
    ``(out, r)``, and with DoRA also ``.lora_magnitude_vector`` ``(out,)``. Layers of a
    `jaxbnb.nnx.LayerStack` are numbered. Each file appears complete or not at all.
    Embeddings have ``.lora_embedding_A`` and ``.lora_embedding_B`` instead. Modules
    trained in full are saved under their own names, biases as ``.base_layer.bias`` or
    ``.bias``, and rows of tokens as ``.token_adapter.trainable_tokens_delta``.

    A layer over other axes, such as ``nnx.LinearGeneral``, is saved as the matrix that
    `LoraAdapter` describes, which is its weight in a PyTorch model. PEFT does not have
    a format for a layer with several kernels, e.g. of experts. There the tensors start
    with the axes of ``batch``; `load_adapter` reads them, and PEFT does not.

    An adapter that started from the weight ("pissa", "olora", "loftq") belongs to the
    model before `add_adapter`. Loading it, here or in PEFT, takes the same part out of
    the weights again. (PEFT 0.21 quantises for "loftq" only on a GPU, and starts
    without dividing by the scale. The base is the same.)

    The adapters of a `jaxbnb.models.CausalLM` are saved under the names of its family.
    If a module of the family is several layers here, as GPT-2's ``c_attn`` is q, k and
    v, their adapters are saved as one, and its rank is the sum of the ranks. PEFT
    computes the same with it, and `load_adapter` takes it apart again.

    Under `jax.distributed`, all processes call this. Each helps to gather the adapter,
    process 0 writes it, and all return once it is complete.

    Args:
        model: a model after `add_adapter`.
        folder: folder to write to, shared by all processes, created if necessary;
            files with these names are replaced.
        name: name of the adapter.
        base_model_name_or_path: recorded for PEFT, which can load the base model by it.
        save_embedding_layers: whether to save the embedding and the head, too, if
            `jaxbnb.models.resize_token_embeddings` has changed them. Without them, the
            adapter fits only a base model with the same rows.

    Raises:
        ValueError: the model does not have this adapter; its layers are stacked, but
            not by a `jaxbnb.nnx.LayerStack`, so they lack names; or a fused module uses
            DoRA or is trained in full in only some of its layers, or has an adapter
            that started from its weight.
        OSError: writing failed, e.g. because the disk is full.
        ProcessError: another process failed, or the folder is not shared.

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
                "LayerStack, and these have no names in PEFT's files; make the stack "
                "with jaxbnb.nnx.LayerStack"
            )
        pieces += _make_pieces(linear, name)
    config = layers[0].layer.adapters[name].config
    fields, metadata = make_fields(model, layers, name), {"format": "pt"}
    fields |= make_trained_fields(model, config, name)
    every = [each for linear in find_linears(model) for each in linear.names]
    in_files = find_file_layers(model, every)
    if not is_plain(in_files):
        joined, summands = join(pieces, in_files, config)
        pieces = list(joined.values())
        fields |= make_fields_in_files(model, joined, in_files, config)
        # PEFT ignores this key.
        metadata[SUMMANDS] = json.dumps(summands)
    tensors = {
        f"{PREFIX}{piece.name}.{kind}": value
        for piece in pieces
        for kind, value in piece.tensors.items()
    }
    tensors |= make_tensors(model, name)
    if save_embedding_layers:
        tensors |= make_base_tensors(model, name, tensors)
    fields["base_model_name_or_path"] = base_model_name_or_path
    folder = Path(folder)
    what = f"saving an adapter to {folder}"
    on_first(what, lambda: folder.mkdir(parents=True, exist_ok=True))
    check_shared(folder)
    data = safetensors.save(tensors, metadata=metadata)
    on_first(what, lambda: _write(folder, fields, data))


def _write(folder: Path, fields: dict[str, Any], weights: bytes) -> None:
    with atomic_write(folder / CONFIG_FILE) as config_path:
        text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
        config_path.write_text(text)
        with atomic_write(folder / WEIGHTS_FILE) as path:
            path.write_bytes(weights)
            # If the process is killed from here on, the folder does not load. That is
            # better than one adapter's weights with the configuration of another.
            (folder / CONFIG_FILE).unlink(missing_ok=True)


def _make_pieces(linear: Adapted, name: str) -> Iterator[Piece]:
    """Yields the adapter of each layer in a stack, under PEFT's names."""
    adapter = linear.layer.adapters[name]
    a, b = (EMBED_A, EMBED_B) if isinstance(linear.layer, LoraEmbed) else (A, B)
    stacked = {a: adapter.lora_a, b: adapter.lora_b}
    if adapter.magnitude is not None:
        stacked[MAGNITUDE] = adapter.magnitude
    unstacked = {}
    for kind, parameter in stacked.items():
        num_axes = len(adapter.scale.shape)
        value = fetch(parameter[...])
        unstacked[kind] = value.reshape(-1, *value.shape[num_axes:])
    scales = np.ravel(fetch(adapter.scale[...]))
    for i, (layer, rank) in enumerate(zip(linear.names, adapter.ranks, strict=True)):
        tensors = {}
        for kind, value in unstacked.items():
            tensor = value[i]
            if kind != MAGNITUDE:
                axis = -1 if kind == a else -2
                tensor = np.take(tensor, range(rank), axis).swapaxes(-1, -2)
            tensors[kind] = np.ascontiguousarray(tensor)
        if rank:
            yield Piece(layer, tensors, float(scales[i]))
