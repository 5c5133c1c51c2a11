"""load_adapter: reads an adapter from PEFT's files."""

import contextlib
import dataclasses
import json
import operator
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.extras import import_extra
from jaxbnb.core.paths import matches
from jaxbnb.lora._adapter import add_adapter
from jaxbnb.lora._base import get_param
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._embed import LoraEmbed
from jaxbnb.lora._layer import DEFAULT
from jaxbnb.lora._more import find_embedding
from jaxbnb.lora._peft_config import AdapterError, read_config
from jaxbnb.lora._peft_fused import split
from jaxbnb.lora._peft_trained import (
    drop_tied_head,
    drop_wrapped,
    match_trained,
    rename_trained,
)
from jaxbnb.lora._targets import find_adapted, find_linears, untie_head_if
from jaxbnb.lora.file_names import (
    BASE,
    CONFIG_FILE,
    EMBED_A,
    EMBED_B,
    MAGNITUDE,
    PREFIX,
    SUMMANDS,
    TOKENS_BASE,
    WEIGHT,
    WEIGHTS_FILE,
    A,
    B,
    NamesLayers,
    find_file_layers,
    has_head,
    parse_key,
)


def load_adapter(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    quant: QuantConfig | str | None = None,
) -> LoraConfig:
    """Adds an adapter that `save_adapter` or PEFT saved to ``model``, in place.

    If PEFT adapts a module that is several layers here, such as GPT-2's ``c_attn``,
    each layer gets all of ``lora_a`` and its part of ``lora_b``, which computes the
    same.

    The adapter is active if it is the first, as after `add_adapter`. Dropout is off
    until ``model.train()``.

    Args:
        model: the base model, quantised or not.
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: name that the adapter gets.
        quant: format of the base that the adapter was trained over, for a model that is
            not quantised yet; see `add_adapter`. "loftq" needs it.

    Returns:
        The adapter's configuration, with our names for layers.

    Raises:
        AdapterError: a file is missing or damaged, or tensors do not fit the model; the
            message names them all. The model is then unchanged.
        NotImplementedError: the files use a feature of PEFT that is not supported.

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
    folder = Path(folder)
    is_transposed = isinstance(model, NamesLayers) and model.is_transposed_in_files()
    config = read_config(folder / CONFIG_FILE, is_transposed)
    path = folder / WEIGHTS_FILE
    try:
        with _open(folder) as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            summands = _read_summands(path, file.metadata() or {})
    except (AttributeError, TypeError) as error:
        raise AdapterError(
            f"{path} has tensors in a dtype that NumPy does not have, maybe float8; "
            "save it in float32, bfloat16 or float16"
        ) from error

    tensors = drop_tied_head(model, drop_wrapped(tensors), config)
    is_tied = has_head(model, tensors)
    with untie_head_if(model, is_tied):
        tensors, config = split(model, tensors, config, summands)
        if is_tied:
            _check_tied(model, tensors, path)
        config = rename_trained(model, tensors, config)
        known = _keep_known_targets(model, config)

        def add(model):
            try:
                rngs = nnx.Rngs(0)
                add_adapter(model, known, name=name, quant=quant, rngs=rngs)
            except ValueError as error:
                raise AdapterError(f"{folder}: {error}") from error
            return model

        # Check an abstract copy first, so that an error leaves the model unchanged.
        _match_values(
            nnx.eval_shape(lambda: add(nnx.clone(model))), name, tensors, path
        )
        add(model)
        for parameter, value in _match_values(model, name, tensors, path):
            parameter[...] = jnp.asarray(value, parameter.dtype)
    for each in find_adapted(model, name):
        each.layer.adapters[name].eval()
    return config


def saved_vocab_size(model: nnx.Module, folder: str | os.PathLike[str]) -> int:
    """Returns the number of tokens that a model must have for an adapter.

    It is the model's own number, unless the adapter's files hold an embedding of
    another size, because the model was resized before it was adapted.

    Args:
        model: base model of the adapter.
        folder: folder of the adapter, see `load_adapter`.

    Raises:
        AdapterError: the file is missing or damaged.
        ValueError: the model has several embeddings, and none is ``embed_tokens``.

    Example:
        >>> import tempfile, jaxbnb
        >>> from flax import nnx
        >>> make = lambda: nnx.Dict(
        ...     embed_tokens=nnx.Embed(32, 64, rngs=nnx.Rngs(0)),
        ...     proj=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> model, folder = make(), tempfile.mkdtemp()
        >>> config = jaxbnb.lora.LoraConfig(r=4)
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.save_adapter(model, folder)
        >>> jaxbnb.lora.saved_vocab_size(make(), folder)
        32
    """
    path = find_embedding(model)
    (layer,) = find_file_layers(model, [path]).values()
    places = [(layer.name, kind) for kind in (WEIGHT, BASE, TOKENS_BASE)]
    with _open(Path(folder)) as file:
        for key in file.keys():  # noqa: SIM118, it is not a dict
            if parse_key(model, key) in places:
                return file.get_slice(key).get_shape()[0]
    (base,) = [each.base for each in find_linears(model) if each.path == path]
    return get_param(base).shape[0]


def check_adapter_files(folder: str | os.PathLike[str]) -> None:
    """Checks an adapter's files, as far as that goes without its model.

    A wrong path is then found before a large model is loaded.

    Args:
        folder: folder of the adapter, see `load_adapter`.

    Raises:
        AdapterError: the files are missing or damaged.
        NotImplementedError: the files use a feature of PEFT that is not supported.

    Example:
        >>> import tempfile, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> config, folder = jaxbnb.lora.LoraConfig(r=4), tempfile.mkdtemp()
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.save_adapter(model, folder)
        >>> jaxbnb.lora.check_adapter_files(folder)
    """
    with warnings.catch_warnings():
        # `load_adapter` will warn.
        warnings.simplefilter("ignore")
        read_config(Path(folder) / CONFIG_FILE, is_transposed=True)
    with _open(Path(folder)):
        pass


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[Any]:
    """Opens the tensors of an adapter.

    Raises:
        AdapterError: there are none, or they are damaged.
    """
    safetensors = import_extra(
        "safetensors", needed_by="jaxbnb.lora.load_adapter", extra="convert"
    )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}; is it an adapter's folder?"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is truncated or damaged: {error}") from error


def _check_tied(model: Any, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Checks that an adapted head was saved with this model's embedding.

    PEFT saves the weight of an adapted head, and loads it as the embedding.

    Raises:
        AdapterError: the weight differs from the model's embedding.
    """
    key = f"{PREFIX}lm_head.{BASE}"
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
            "is its head too; the adapter belongs to another base model, or to one "
            "that was resized or trained: load that one"
        )


def _keep_known_targets(model: nnx.Module, config: LoraConfig) -> LoraConfig:
    """Drops names that mean nothing here; a list may serve several kinds of models.

    This loses nothing, because every tensor of the file must find its layer.
    """
    paths = [
        name for linear in find_linears(model) for name in (linear.path, *linear.names)
    ]

    def keep_known(names):
        if names is None or isinstance(names, str):
            return names
        return [name for name in names if any(matches(path, [name]) for path in paths)]

    excluded = keep_known(config.exclude_modules)
    if isinstance(excluded, str) and not any(matches(p, excluded) for p in paths):
        excluded = None
    return dataclasses.replace(
        config,
        target_modules=keep_known(config.target_modules) or config.target_modules,
        exclude_modules=excluded or None,
    )


def _read_summands(path: Path, metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Reads the ranks that `save_adapter` added up, for each fused module."""
    try:
        summands = json.loads(metadata.get(SUMMANDS, "{}"))
        return {str(k): [operator.index(n) for n in v] for k, v in summands.items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} has damaged metadata: {error}") from error


def _match_values(
    model: nnx.Module, name: str, tensors: dict[str, np.ndarray], path: Path
) -> list[tuple[nnx.Variable, np.ndarray]]:
    """Finds the value of each parameter of the adapter, checking names and shapes."""
    values, problems, used = [], [], set()

    def take(key: str, shape: tuple[int, ...], hint: str = "") -> np.ndarray:
        used.add(key)
        if problem := _find_problem(key, tensors.get(key), shape):
            problems.append(problem + hint)
            return np.zeros(shape, np.float32)
        return tensors[key]

    for linear in find_adapted(model, name):
        adapter = linear.layer.adapters[name]
        is_embedding = isinstance(linear.layer, LoraEmbed)
        a, b = (EMBED_A, EMBED_B) if is_embedding else (A, B)
        parameters = {a: adapter.lora_a, b: adapter.lora_b}
        if adapter.magnitude is not None:
            parameters[MAGNITUDE] = adapter.magnitude
        for kind, parameter in parameters.items():
            shape, layers = parameter.shape[len(adapter.scale.shape) :], []
            for layer, rank in zip(linear.names, adapter.ranks, strict=True):
                want = _shape_in_files(kind, shape, rank)
                value = np.zeros(want, np.float32)
                if rank:
                    value = take(f"{PREFIX}{layer}.{kind}", want)
                value = value if kind == MAGNITUDE else value.swapaxes(-1, -2)
                short = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
                layers.append(np.pad(value, short))
            values.append((parameter, np.stack(layers).reshape(parameter.shape)))
        for layer in linear.names:
            key, kernel = f"{PREFIX}{layer}.{BASE}", get_param(linear.layer.base)
            if key in tensors:
                shape = tuple(kernel.shape)
                weight = take(key, shape if is_embedding else shape[::-1])
                if not isinstance(kernel.get_value(), QuantizedArray):
                    values.append((kernel, weight if is_embedding else weight.T))
    values += match_trained(model, name, tensors, take)
    problems += [f"{key} belongs to no adapted layer" for key in set(tensors) - used]
    if problems:
        count = f"{len(problems)} tensor{'' if len(problems) == 1 else 's'}"
        shown = sorted(problems)[:20]
        if rest := len(problems) - len(shown):
            shown.append(f"and {rest} more")
        lines = "\n  ".join(shown)
        raise AdapterError(f"{path} does not fit the model in {count}:\n  {lines}")
    return values


def _shape_in_files(kind: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Returns the shape that files have for a parameter of one layer."""
    if kind in (A, EMBED_A):
        return (*shape[:-2], rank, shape[-2])
    if kind in (B, EMBED_B):
        return (*shape[:-2], shape[-1], rank)
    return shape


def _find_problem(
    key: str, tensor: np.ndarray | None, want: tuple[int, ...]
) -> str | None:
    if tensor is None:
        return f"{key} is missing"
    if tensor.shape != want:
        return f"{key} is {tensor.shape}, not {want}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"{key} is {tensor.dtype}, not floating"
    return None
