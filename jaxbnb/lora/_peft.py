"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.core._files import atomic_write
from jaxbnb.core._optional import import_extra
from jaxbnb.core._paths import matches
from jaxbnb.lora._adapter import LoraConfig, LoraLinear, add_adapter
from jaxbnb.nnx import LayerStack, QuantLinear, _surgery

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

# Fields of PEFT's LoraConfig that change what is computed, and the values that mean "no
# such change". A file with other values is refused rather than half understood.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    # The others change the base model.
    "init_lora_weights": (True, False, None, "gaussian"),
    "alora_invocation_tokens": (None,),
}


class AdapterError(ValueError):
    """An adapter's files are missing, damaged, or do not fit the model."""


def save_adapter(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Saves the adapters of ``model`` as PEFT does.

    ``adapter_model.safetensors`` holds, for each adapted layer,
    ``base_model.model.<path>.lora_A.weight`` ``(r, in)`` and ``.lora_B.weight``
    ``(out, r)``; the layers of a `jaxbnb.nnx.LayerStack` are numbered. Each file
    appears complete or not at all.

    Args:
        model: a model after `add_adapter`.
        folder: made if it is not there; files of these names in it are replaced.
        base_model_name_or_path: recorded for PEFT, which can load the base model by it.

    Raises:
        ValueError: the model has no adapters.
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
    adapters = list(_adapters(model))
    if not adapters:
        raise ValueError(
            f"{type(model).__name__} has no adapters to save; add_adapter makes them"
        )
    config = adapters[0][1].config
    tensors = {}
    for names, adapter in adapters:
        lora_a, lora_b = (np.asarray(p[...]) for p in (adapter.lora_a, adapter.lora_b))
        for key, a, b in zip(names, _unstack(lora_a), _unstack(lora_b), strict=True):
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.T)
    fields = {
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": _target_modules(model),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS_FILE) as path:
        path.write_bytes(safetensors.save(tensors, metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(fields, indent=2) + "\n")


def load_adapter(model: nnx.Module, folder: str | os.PathLike[str]) -> LoraConfig:
    """Adds the adapters that `save_adapter`, or PEFT, saved to ``model``, in place.

    Args:
        model: the base model, without adapters; quantised or not.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapters' configuration.

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
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}; is it an adapter's folder?"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is truncated or damaged: {error}") from error
    except (AttributeError, TypeError) as error:
        raise AdapterError(
            f"{path} has tensors of a dtype that NumPy does not have, maybe float8; "
            "save it in float32, bfloat16 or float16"
        ) from error
    # Checked against an abstract copy, so that an error leaves the model as it was.
    _values(nnx.eval_shape(lambda: _adapted(nnx.clone(model), config)), tensors, path)
    add_adapter(model, config, rngs=nnx.Rngs(0))
    for parameter, value in _values(model, tensors, path):
        parameter[...] = jnp.asarray(value, parameter.dtype)
    return config


def _adapted(model: nnx.Module, config: LoraConfig) -> nnx.Module:
    try:
        add_adapter(model, config, rngs=nnx.Rngs(0))
    except ValueError as error:
        raise AdapterError(str(error)) from error
    return model


def _values(
    model: nnx.Module, tensors: dict[str, np.ndarray], path: Path
) -> list[tuple[nnx.Variable, np.ndarray]]:
    """The value of each parameter of the adapters; checks every name and shape."""
    values, problems, used = [], [], set()
    for names, adapter in _adapters(model):
        for kind, parameter in (("A", adapter.lora_a), ("B", adapter.lora_b)):
            want = tuple(reversed(parameter.shape[-2:]))
            keys = [f"{name}.lora_{kind}.weight" for name in names]
            used.update(keys)
            missing = [key for key in keys if key not in tensors]
            there = [key for key in keys if key in tensors]
            wrong = [k for k in there if tensors[k].shape != want]
            dtypes = {k: tensors[k].dtype for k in there}
            ints = [k for k in there if not jnp.issubdtype(dtypes[k], jnp.floating)]
            problems += [f"{key} is missing" for key in missing]
            problems += [f"{k} is {tensors[k].shape}, not {want}" for k in wrong]
            problems += [f"{k} is {dtypes[k]}, not floating" for k in ints]
            if not missing and not wrong and not ints:
                value = np.stack([tensors[key].T for key in keys])
                values.append((parameter, value.reshape(parameter.shape)))
    problems += [f"{key} belongs to no adapted layer" for key in set(tensors) - used]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise AdapterError(
            f"{path} does not fit the model in {len(problems)} tensors:\n  {shown}"
        )
    return values


def _read_config(path: Path) -> LoraConfig:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "r" not in fields:
        raise AdapterError(f"{path} is not an adapter's configuration: it has no 'r'")
    for name, plain in _PLAIN.items():
        if name in fields and fields[name] not in plain:
            raise NotImplementedError(
                f"{path} has {name}={fields[name]!r}, which is not supported; "
                f"supported is {plain[0]!r}"
            )
    try:
        return LoraConfig(
            r=fields["r"],
            lora_alpha=fields.get("lora_alpha", 8),
            target_modules=fields.get("target_modules") or "all-linear",
            use_rslora=bool(fields.get("use_rslora", False)),
        )
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def _adapters(model: nnx.Module) -> Iterator[tuple[list[str], LoraLinear]]:
    """Each adapter with the name PEFT has for it: one a layer of a stack."""
    stacks = {
        path: module.num_layers
        for path, _, _, module in _surgery.children(model)
        if isinstance(module, LayerStack)
    }
    for path, _, _, module in _surgery.children(model):
        if isinstance(module, LoraLinear):
            yield [f"base_model.model.{name}" for name in _names(path, stacks)], module


def _target_modules(model: nnx.Module) -> list[str]:
    """The adapted layers, each by the shortest name that no other layer answers to."""
    modules = {path: module for path, _, _, module in _surgery.children(model)}
    adapted = [p for p, m in modules.items() if isinstance(m, LoraLinear)]
    others = [
        path
        for path, module in modules.items()
        if isinstance(module, nnx.Linear | QuantLinear)
        and path.removesuffix(".base") not in adapted
    ]
    names = set()
    for path in adapted:
        parts = path.split(".")
        suffixes = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
        free = (s for s in suffixes if not any(matches(p, [s]) for p in others))
        names.add(next(free, path))
    return sorted(names)


def _names(path: str, stacks: dict[str, int]) -> list[str]:
    """The path for every layer of the stack it is in, or of the stacks in stacks."""
    around = [stack for stack in stacks if path.startswith(f"{stack}.layer.")]
    name = path
    # The innermost first, which is the last to be found.
    for stack in reversed(around):
        name = f"{stack}.{{}}.{name.removeprefix(f'{stack}.layer.')}"
    numbers = itertools.product(*(range(stacks[stack]) for stack in around))
    return [name.format(*index) for index in numbers]


def _unstack(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])
