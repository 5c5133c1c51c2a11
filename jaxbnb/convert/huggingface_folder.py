"""Hugging Face folders: config.json and one or more files of weights."""

import dataclasses
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxbnb.convert import (
    _bitsandbytes_reader,
    _pytorch,
    _quantization_methods,
    safetensors_files,
)
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    QuantizedTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.convert.file_reader import FileReader
from jaxbnb.convert.json_files import parse_json

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
# Files of weights and their index, if there are several.
SHARD: Final = "model-{:05}-of-{:05}.safetensors"
INDEX: Final = "model.safetensors.index.json"
# Marks a folder that `convert_to_flax` wrote.
FLAX: Final = "flax.json"
# Marks a folder that PEFT wrote.
ADAPTER: Final = "adapter_config.json"
# In the order of transformers: safetensors before pickles, one file before shards.
SOURCES: Final = (
    (WEIGHTS, INDEX),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SHARD: Final = r"(?a:\w[\w.+-]{0,250})"


def open_folder(folder: Path) -> Checkpoint:
    """Opens a Hugging Face folder.

    Raises:
        CheckpointError: config.json or the weights are missing, or a file of weights
            contradicts its header or the index.
        UnsupportedCheckpointError: the folder holds an adapter, or the state of a Flax
            model.
    """
    config = read_config(folder)
    try:
        return _open_weights(folder, config)
    except QuantizedTensorError as error:
        fields = config.get("quantization_config")
        method = fields.get("quant_method") if isinstance(fields, dict) else None
        names = "no method" if method is None else f"the method {str(method)[:40]!r}"
        raise UnsupportedCheckpointError(f"{error}. {CONFIG} names {names}") from error


def _open_weights(folder: Path, config: dict[str, Any]) -> Checkpoint:
    for whole, index in SOURCES:
        if (folder / whole).is_file():
            return open_file(folder / whole, path=folder, config=config)
        if (folder / index).is_file():
            files = _read_index(folder, index)
            return _open(folder, config, _read_shards(folder, index, files), files)
    _refuse_other_folders(folder)
    names = [name for pair in SOURCES for name in pair]
    raise CheckpointError(
        f"{folder} has no weights, which are one of {names}; {_list_files(folder)}. "
        "Save it again with save_pretrained(...)"
    )


def open_file(
    file: Path, *, path: Path | None = None, config: dict[str, Any] | None = None
) -> Checkpoint:
    """Opens one file of weights; without a config, the model remains unknown."""
    tensors = _read_header(file)
    files = dict.fromkeys(tensors, file)
    return _open(path or file, {} if config is None else config, tensors, files)


def _open(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    files: dict[str, Path],
) -> Checkpoint:
    checkpoint = Checkpoint(
        path=path,
        config=config,
        tensors=types.MappingProxyType(tensors),
        reader=FileReader(
            lambda name: _read_tensor(files[name], name),
            lambda name: _map_tensor(files[name], name),
        ),
    )
    if _quantization_methods.needs_metadata(checkpoint):
        metadata: dict[str, str] = {}
        for file in dict.fromkeys(files.values()):
            if file.suffix == ".safetensors":
                metadata |= safetensors_files.read_metadata(file)
        checkpoint = dataclasses.replace(
            checkpoint, metadata=types.MappingProxyType(metadata)
        )
    names_by_file: dict[Path, list[str]] = {}
    small = _bitsandbytes_reader.find_states(tensors)
    for name in small + _quantization_methods.find_shapes(checkpoint):
        names_by_file.setdefault(files[name], []).append(name)
    arrays = {
        name: array
        for file, names in names_by_file.items()
        for name, array in _read_tensors(file, names).items()
    }
    checkpoint = _bitsandbytes_reader.merge_parts(checkpoint, arrays)
    checkpoint = _quantization_methods.merge_weights(checkpoint, arrays)
    for name, info in checkpoint.tensors.items():
        if info.dtype in safetensors_files.FLOAT8:
            raise QuantizedTensorError(
                files[name], name, safetensors_files.CODES[info.dtype]
            )
    return checkpoint


def _read_header(file: Path) -> dict[str, TensorInfo]:
    read: Callable[[Path], dict[str, TensorInfo]] = safetensors_files.read_header
    return (read if file.suffix == ".safetensors" else _pytorch.read_header)(file)


def _read_tensor(file: Path, name: str) -> np.ndarray:
    is_safe = file.suffix == ".safetensors"
    return (safetensors_files if is_safe else _pytorch).read_tensor(file, name)


def _map_tensor(file: Path, name: str) -> np.ndarray:
    is_safe = file.suffix == ".safetensors"
    return (safetensors_files.map_tensor if is_safe else _read_tensor)(file, name)


def _read_tensors(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return safetensors_files.read_tensors(file, names)
    return {name: _pytorch.read_tensor(file, name) for name in names}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the fields of ``config.json``."""
    path = folder / CONFIG
    if not path.is_file():
        _refuse_other_folders(folder)
        ggufs = sorted(folder.glob("*.gguf"))
        hint = (
            f"open the file itself: {ggufs[0]}" if ggufs else "is it the right folder?"
        )
        raise CheckpointError(
            f"{folder} has no {CONFIG}; {_list_files(folder)}; {hint}"
        )
    return parse_json(path, path.read_bytes())


def _read_index(folder: Path, index: str) -> dict[str, Path]:
    """Returns tensor name -> shard, a file directly in ``folder``."""
    path = folder / index
    weight_map = parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        # A path could point to any file of this machine. (A shard may be a symbolic
        # link, as in Hugging Face's cache: someone who can create links needs no
        # index.)
        if not isinstance(shard, str) or not re.fullmatch(_SHARD, shard):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {str(shard)[:200]!r}; a shard must "
                "be the plain name of a file in that folder. Do not use this checkpoint"
            )
    lacking = sorted({s for s in weight_map.values() if not (folder / s).is_file()})
    suffix = Path(index.removesuffix(".index.json")).suffix
    other = [s for s in weight_map.values() if Path(s).suffix != suffix]
    if other:
        raise CheckpointError(
            f"{path} names the shard {other[0]!r}, which is not a {suffix} file"
        )
    if lacking:
        raise CheckpointError(
            f"{path} names {len(lacking)} shards that are not in the folder, the first "
            f"of them {lacking[0]!r}; {_list_files(folder)}. Download the missing files"
        )
    return {name: folder / shard for name, shard in weight_map.items()}


def _read_shards(
    folder: Path, index: str, files: dict[str, Path]
) -> dict[str, TensorInfo]:
    """Returns the tensors of all shards that the index names."""
    headers = {file: _read_header(file) for file in sorted({*files.values()})}
    for name, file in files.items():
        if name not in headers[file]:
            raise MissingTensorError(
                f"{folder / index} places tensor {name!r} in {file.name!r}, which does "
                f"not have it among its {len(headers[file])}; download both again"
            )
    return {
        name: info
        for file, header in headers.items()
        for name, info in header.items()
        if files.get(name) == file
    }


def _refuse_other_folders(folder: Path) -> None:
    """Raises if another function reads this kind of folder."""
    if (folder / ADAPTER).is_file():
        raise UnsupportedCheckpointError(
            f"{folder} is an adapter ({ADAPTER}), not a model; load its base model, "
            "then the adapter with jaxbnb.lora.load_adapter(model, folder)"
        )
    if (folder / FLAX).is_file():
        raise UnsupportedCheckpointError(
            f"{folder} holds the state of a Flax model ({FLAX}), which cannot be "
            "converted back; load it with jaxbnb.load_pretrained, and write that model "
            "with save_pretrained"
        )


def _list_files(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it holds {names[:12]}{more}" if names else "it is empty"
