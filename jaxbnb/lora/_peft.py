"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.core.paths import matches
from jaxbnb.lora import file_names
from jaxbnb.lora._adapter import add_adapter
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._layer import DEFAULT
from jaxbnb.lora._peft_config import (
    AdapterError,
    fields_of,
    fields_of_files,
    read_config,
)
from jaxbnb.lora._targets import (
    Adapted,
    adapted,
    adapter_names,
    linears,
    own_head,
)
from jaxbnb.lora.file_names import NamesLayers, Piece

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
SUMMANDS: Final = "jaxbnb.summands"


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
    layers = list(adapted(model, name))
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
        pieces += _pieces(linear, name)
    fields, metadata = fields_of(model, layers, name), {"format": "pt"}
    every = [each for linear in linears(model) for each in linear.names]
    in_files = file_names.file_layers(model, every)
    if not file_names.is_plain(in_files):
        config = layers[0].layer.adapters[name].config
        joined, summands = file_names.join(pieces, in_files, config)
        pieces = list(joined.values())
        fields |= fields_of_files(model, joined, in_files, config)
        # PEFT leaves it alone.
        metadata[SUMMANDS] = json.dumps(summands)
    tensors = {
        f"{file_names.PREFIX}{piece.name}.{kind}": value
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


def load_adapter(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    quant: QuantConfig | str | None = None,
) -> LoraConfig:
    """Adds an adapter that `save_adapter`, or PEFT, saved to ``model``, in place.

    Where PEFT adapts in one what is several layers here, such as GPT-2's ``c_attn``,
    each of them gets ``lora_a`` whole and its part of ``lora_b``, which computes the
    same.

    As after `add_adapter` it is active if it is the first. Dropout is off until
    ``model.train()``.

    Args:
        model: the base model; quantised or not.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: that the adapter gets.
        quant: as of `add_adapter`: the format of the base that the adapter was trained
            over, for a model that is not quantised yet. "loftq" needs it.

    Returns:
        The adapter's configuration, with layers by their names here.

    Raises:
        AdapterError: a file is missing or damaged, or its tensors do not fit the model;
            the message names every one that does not. The model is then unchanged.
        NotImplementedError: the files use a feature of PEFT's that is not supported.

    Example:
        >>> import tempfile, jaxbnb
        >>> from flax import nnx
        >>> make = lambda: nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> model, folder = make(), tempfile.mkdtemp()
        >>> config = jaxbnb.lora.LoraConfig(r=4)
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.save_adapter(model, folder)
        >>> jaxbnb.lora.load_adapter(make(), folder).r
        4
    """
    safetensors = import_extra(
        "safetensors", needed_by="jaxbnb.lora.load_adapter", extra="convert"
    )
    folder = Path(folder)
    is_transposed = isinstance(model, NamesLayers) and model.is_transposed_in_files()
    config = read_config(folder / CONFIG_FILE, is_transposed)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}; is it an adapter's folder?"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            summands = _summands(path, file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is truncated or damaged: {error}") from error
    except (AttributeError, TypeError) as error:
        raise AdapterError(
            f"{path} has tensors of a dtype that NumPy does not have, maybe float8; "
            "save it in float32, bfloat16 or float16"
        ) from error

    _check_no_embedding(path, tensors)
    is_tied = file_names.has_head(model, tensors)
    with own_head(model, is_tied):
        tensors, config = file_names.split(model, tensors, config, summands)
        if is_tied:
            _check_tied(model, tensors, path)
        known = _known_targets(model, config)

        def add(model):
            try:
                rngs = nnx.Rngs(0)
                add_adapter(model, known, name=name, quant=quant, rngs=rngs)
            except ValueError as error:
                raise AdapterError(f"{folder}: {error}") from error
            return model

        # Checked on an abstract copy, so that an error leaves the model as it was.
        _values(nnx.eval_shape(lambda: add(nnx.clone(model))), name, tensors, path)
        add(model)
        for parameter, value in _values(model, name, tensors, path):
            parameter[...] = jnp.asarray(value, parameter.dtype)
    for each in adapted(model, name):
        each.layer.adapters[name].eval()
    return config


def _check_no_embedding(path: Path, tensors: Iterable[str]) -> None:
    of_embeddings = [name for name in tensors if "lora_embedding_" in name]
    if of_embeddings:
        raise NotImplementedError(
            f"{path} adapts an embedding, {of_embeddings[0]}, which is not supported; "
            "merge it into the base model with PEFT"
        )


def _check_tied(model: Any, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Checks that an adapted head was saved with the model's own embedding.

    PEFT saves the weight of an adapted head, and loads it as the embedding.

    Raises:
        AdapterError: it differs from the embedding of the model.
    """
    key = f"{file_names.PREFIX}lm_head.{file_names.BASE}"
    theirs = tensors.get(key)
    ours = model.lm_head.kernel.get_value()
    if theirs is None or isinstance(ours, jax.ShapeDtypeStruct | Tracer):
        return
    ours = np.asarray(ours).T
    # Either of the two may have been rounded.
    is_same = theirs.shape == ours.shape and (
        np.array_equal(theirs, ours.astype(theirs.dtype))
        or np.array_equal(theirs.astype(ours.dtype), ours)
    )
    if not is_same:
        raise AdapterError(
            f"{path}: {key} {theirs.shape} differs from the model's embedding, which "
            "is its head too; the adapter is for another base model, or for one that "
            "was resized or trained: load that one"
        )


def _known_targets(model: nnx.Module, config: LoraConfig) -> LoraConfig:
    """Without names that mean nothing here: a list may be for several kinds of models.

    Nothing is lost by it: every tensor of the file must find its layer.
    """
    paths = [name for linear in linears(model) for name in (linear.path, *linear.names)]

    def known(names):
        if names is None or isinstance(names, str):
            return names
        return [name for name in names if any(matches(path, [name]) for path in paths)]

    excluded = known(config.exclude_modules)
    if isinstance(excluded, str) and not any(matches(p, excluded) for p in paths):
        excluded = None
    return dataclasses.replace(
        config,
        target_modules=known(config.target_modules) or config.target_modules,
        exclude_modules=excluded or None,
    )


def _pieces(linear: Adapted, name: str) -> Iterator[Piece]:
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


def _summands(path: Path, metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Of fused modules, the ranks that `save_adapter` added up."""
    try:
        summands = json.loads(metadata.get(SUMMANDS, "{}"))
        return {str(k): [operator.index(n) for n in v] for k, v in summands.items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} has damaged metadata: {error}") from error


def _values(
    model: nnx.Module, name: str, tensors: dict[str, np.ndarray], path: Path
) -> list[tuple[nnx.Variable, np.ndarray]]:
    """The value of each parameter of the adapter; checks every name and shape."""
    values, problems, used = [], [], set()
    for linear in adapted(model, name):
        adapter = linear.layer.adapters[name]
        kinds = [(".lora_A.weight", adapter.lora_a), (".lora_B.weight", adapter.lora_b)]
        if adapter.magnitude is not None:
            kinds.append((".lora_magnitude_vector", adapter.magnitude))
        for kind, parameter in kinds:
            found = []
            shape = parameter.shape[len(adapter.scale.shape) :]
            for each, rank in zip(linear.names, adapter.ranks, strict=True):
                is_factor = kind != ".lora_magnitude_vector"
                want = shape
                if kind == ".lora_A.weight":
                    want = (*shape[:-2], rank, shape[-2])
                elif kind == ".lora_B.weight":
                    want = (*shape[:-2], shape[-1], rank)
                key = f"base_model.model.{each}{kind}"
                value = np.zeros(want, np.float32)
                if rank:
                    used.add(key)
                    problem = _problem(key, tensors.get(key), want)
                    problems += [problem] if problem else []
                    value = value if problem else tensors[key]
                value = value.swapaxes(-1, -2) if is_factor else value
                short = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
                found.append(np.pad(value, short))
            values.append((parameter, np.stack(found).reshape(parameter.shape)))
        for each in linear.names:
            key = f"base_model.model.{each}.{file_names.BASE}"
            if key in tensors:
                used.add(key)
                kernel = linear.layer.base.kernel
                problem = _problem(key, tensors[key], tuple(kernel.shape)[::-1])
                problems += [problem] if problem else []
                if not isinstance(kernel.get_value(), QuantizedArray):
                    values.append((kernel, tensors[key].T))
    problems += [f"{key} belongs to no adapted layer" for key in set(tensors) - used]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise AdapterError(
            f"{path} does not fit the model in {len(problems)} tensors:\n  {shown}"
        )
    return values


def _problem(key: str, tensor: np.ndarray | None, want: tuple[int, ...]) -> str | None:
    if tensor is None:
        return f"{key} is missing"
    if tensor.shape != want:
        return f"{key} is {tensor.shape}, not {want}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"{key} is {tensor.dtype}, not floating"
    return None
