"""Hugging Face folders: config.json and one or more safetensors files."""

import re
import types
from pathlib import Path
from typing import Any, Final

from jaxbnb.convert import _safetensors
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, MissingTensorError

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_SHARD: Final = r"(?a:\w[\w.+-]{0,250})"


def open_folder(folder: Path) -> Checkpoint:
    """Opens a Hugging Face folder; as transformers does, one file before shards.

    Raises:
        CheckpointError: no config.json, no weights in safetensors, or a file of them
            that is not what its header or the index says.
    """
    config = read_config(folder)
    if (folder / WEIGHTS).is_file():
        tensors = _safetensors.read_header(folder / WEIGHTS)
        files = dict.fromkeys(tensors, folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        files = _read_index(folder)
        tensors = _shards(folder, files)
    else:
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; {_holds(folder)}. "
            "Save it again with save_pretrained(..., safe_serialization=True)"
        )
    return Checkpoint(
        path=folder,
        config=config,
        tensors=types.MappingProxyType(tensors),
        reader=lambda name: _safetensors.read_tensor(files[name], name),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of ``config.json``."""
    path = folder / CONFIG
    if not path.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"open the file itself: {ggufs[0]}" if ggufs else "is it another folder?"
        raise CheckpointError(f"{folder} has no {CONFIG}; {_holds(folder)}; {hint}")
    return _safetensors.parse_json(path, path.read_bytes())


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> the shard that holds it, which lies in ``folder`` itself."""
    path = folder / INDEX
    weight_map = _safetensors.parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        # A path here could read any file of this machine. (A shard may be a symbolic
        # link, as in Hugging Face's cache; who can make links needs no index.)
        if not isinstance(shard, str) or not re.fullmatch(_SHARD, shard):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {str(shard)[:200]!r}; a shard must "
                "be the plain name of a file in that folder. Do not use this checkpoint"
            )
    lacking = sorted({s for s in weight_map.values() if not (folder / s).is_file()})
    if lacking:
        raise CheckpointError(
            f"{path} names {len(lacking)} shards that are not in the folder, the first "
            f"of them {lacking[0]!r}; {_holds(folder)}. Download the missing files"
        )
    return {name: folder / shard for name, shard in weight_map.items()}


def _shards(folder: Path, files: dict[str, Path]) -> dict[str, TensorInfo]:
    headers = {
        file: _safetensors.read_header(file) for file in sorted({*files.values()})
    }
    for name, file in files.items():
        if name not in headers[file]:
            raise MissingTensorError(
                f"{folder / INDEX} places tensor {name!r} in {file.name!r}, which does "
                f"not have it among its {len(headers[file])}; download both again"
            )
    return {
        name: info
        for file, header in headers.items()
        for name, info in header.items()
        if files.get(name) == file
    }


def _holds(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it holds {names[:12]}{more}" if names else "it is empty"
