"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.core import QuantConfig
from jaxbnb.core._files import atomic_write
from jaxbnb.core._optional import import_extra
from jaxbnb.core._paths import matches
from jaxbnb.lora import _file_names
from jaxbnb.lora._adapter import add_adapter
from jaxbnb.lora._config import INITS, LoraConfig
from jaxbnb.lora._file_names import NamesLayers, Piece
from jaxbnb.lora._layer import DEFAULT
from jaxbnb.lora._targets import Adapted, adapted, adapter_names, linears

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
SUMMANDS: Final = "jaxbnb.summands"

# Fields of PEFT's LoraConfig that change what is computed, and the values that mean "no
# such change". A file with other values is refused rather than half understood.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "fan_in_fan_out": (False, None),
    # The others change the base model, and in ways that are not deterministic.
    "init_lora_weights": (*INITS, None),
    "alora_invocation_tokens": (None,),
}


class AdapterError(ValueError):
    """An adapter's files are missing, damaged, or do not fit the model."""


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
    fields, metadata = _fields(model, layers, name), {"format": "pt"}
    every = [each for linear in linears(model) for each in linear.names]
    in_files = _file_names.file_layers(model, every)
    if not _file_names.is_plain(in_files):
        config = layers[0].layer.adapters[name].config
        joined, summands = _file_names.join(pieces, in_files, config)
        pieces = list(joined.values())
        fields |= _fields_of_files(model, joined, in_files, config)
        # PEFT leaves it alone.
        metadata[SUMMANDS] = json.dumps(summands)
    tensors = {
        f"{_file_names.PREFIX}{piece.name}.{kind}": value
        for piece in pieces
        for kind, value in piece.tensors.items()
    }
    fields["base_model_name_or_path"] = base_model_name_or_path
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS_FILE) as path:
        path.write_bytes(safetensors.save(tensors, metadata=metadata))
    with atomic_write(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n")


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
    config = _read_config(folder / CONFIG_FILE, is_transposed)
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

    tensors, config = _file_names.split(model, tensors, config, summands)
    known = _known_targets(model, config)

    def add(model):
        try:
            rngs = nnx.Rngs(0)
            add_adapter(model, known, name=name, quant=quant, rngs=rngs)
        except ValueError as error:
            raise AdapterError(f"{folder}: {error}") from error
        return model

    # Checked against an abstract copy, so that an error leaves the model as it was.
    _values(nnx.eval_shape(lambda: add(nnx.clone(model))), name, tensors, path)
    add(model)
    for parameter, value in _values(model, name, tensors, path):
        parameter[...] = jnp.asarray(value, parameter.dtype)
    for each in adapted(model, name):
        each.layer.adapters[name].eval()
    return config


def _known_targets(model: nnx.Module, config: LoraConfig) -> LoraConfig:
    """Without names that mean nothing here: a list may be for several kinds of models.

    Nothing is lost by it: every tensor of the file must find its layer.
    """
    names = config.target_modules
    if isinstance(names, str):
        return config
    paths = [name for linear in linears(model) for name in (linear.path, *linear.names)]
    known = [name for name in names if any(matches(path, [name]) for path in paths)]
    return dataclasses.replace(config, target_modules=known or names)


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
    except (AttributeError, TypeError, ValueError) as error:
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


def _read_config(path: Path, is_transposed: bool) -> LoraConfig:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "r" not in fields:
        raise AdapterError(f"{path} is not an adapter's configuration: it has no 'r'")
    for name, plain in _PLAIN.items():
        if name == "fan_in_fan_out" and is_transposed:
            # Of the base's kernel; those of the adapter are as always.
            continue
        if name in fields and fields[name] not in plain:
            raise NotImplementedError(
                f"{path} has {name}={fields[name]!r}, which is not supported; "
                f"supported is {plain[0]!r}"
            )
    loftq = fields.get("loftq_config") or {}
    init = fields.get("init_lora_weights")
    try:
        return LoraConfig(
            r=fields["r"],
            lora_alpha=fields.get("lora_alpha", 8),
            target_modules=fields.get("target_modules") or "all-linear",
            use_rslora=bool(fields.get("use_rslora", False)),
            use_dora=bool(fields.get("use_dora", False)),
            lora_dropout=fields.get("lora_dropout") or 0.0,
            init_lora_weights=True if init is None else init,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            loftq_iter=loftq.get("loftq_iter", 1),
        )
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def _fields(model: nnx.Module, layers: list[Adapted], name: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says, with every layer by its number."""
    config = layers[0].layer.adapters[name].config
    ranks, alphas = {}, {}
    for linear in layers:
        for each, rank in zip(
            linear.names, linear.layer.adapters[name].ranks, strict=True
        ):
            if rank:
                ranks[each] = rank
                alphas[each] = config.alpha_of(each, linear.path)
    fields = {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": config.init_lora_weights,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": _pattern(config.rank_pattern, config.rank_of, ranks, config.r),
        "alpha_pattern": _pattern(
            config.alpha_pattern, config.alpha_of, alphas, config.lora_alpha
        ),
        "target_modules": _target_modules(
            [each for linear in linears(model) for each in linear.names], set(ranks)
        ),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if config.init_lora_weights == "loftq":
        kernel: Any = layers[0].layer.base.kernel.get_value()
        bits = 8 * kernel.codes.nbytes // kernel.size
        fields["loftq_config"] = {"loftq_bits": bits, "loftq_iter": config.loftq_iter}
    return fields


def _fields_of_files(
    model: nnx.Module,
    joined: Mapping[str, Piece],
    layers: Mapping[str, _file_names.FileLayer],
    config: LoraConfig,
) -> dict[str, Any]:
    """What of the configuration is said with the names of the base model's files."""
    ranks = {name: piece.rank for name, piece in joined.items()}
    alphas = {n: _file_names.alpha_of(piece, config) for n, piece in joined.items()}
    return {
        "fan_in_fan_out": isinstance(model, NamesLayers)
        and model.is_transposed_in_files(),
        "rank_pattern": _by_number(ranks, config.r),
        "alpha_pattern": _by_number(alphas, config.lora_alpha),
        "target_modules": _target_modules(
            {layer.name for layer in layers.values()}, set(joined)
        ),
    }


def _by_number(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {re.escape(n): value for n, value in values.items() if value != default}


def _pattern(
    pattern: Mapping[str, Any],
    value_of: Callable[[str], Any],
    values: dict[str, Any],
    default: Any,
) -> dict[str, Any]:
    """The pattern as it was given, if it says the same of the layers by number."""
    if all(value_of(name) == value for name, value in values.items()):
        return dict(pattern)
    return _by_number(values, default)


def _target_modules(every: Iterable[str], names: set[str]) -> list[str]:
    """The adapted layers, each by the shortest name that no other layer answers to."""
    others = [name for name in every if name not in names]
    shortest = set()
    for name in names:
        parts = name.split(".")
        suffixes = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
        free = (s for s in suffixes if not any(matches(p, [s]) for p in others))
        shortest.add(next(free, name))
    return sorted(shortest)
