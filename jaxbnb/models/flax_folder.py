"""Folders with a model's NNX state: config.json, flax.json, and Orbax's files.

flax.json has the dtype of the variables and the format of each quantised layer. They
suffice to build the model again without its weights.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbnb.convert import Checkpoint, CheckpointError
from jaxbnb.convert.format_version import check_version
from jaxbnb.convert.huggingface_folder import (
    CONFIG,
    FLAX,
    SOURCES,
    read_config,
)
from jaxbnb.convert.json_files import parse_json, write_json
from jaxbnb.convert.tokenizer_files import carry_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.core.extras import import_extra
from jaxbnb.models._names import find_param_dtype
from jaxbnb.models._tied import tie_like
from jaxbnb.nnx import QuantLinear

_STATE: Final = "state"
# Raised when an older jaxbnb could not read a folder. 0 is that of folders without one.
VERSION: Final = 1


def is_flax_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that `write_state` wrote."""
    return (Path(path) / FLAX).is_file()


def write_state(model: Any, source: Checkpoint, folder: Path) -> None:
    """Writes a model, and the config and tokenizer of the checkpoint it came from."""
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    state = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in variables.items()
    }
    formats = {
        ".".join(map(str, path)): module.config.to_dict()
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantLinear)
    }
    fields = {
        "format_version": VERSION,
        "dtype": find_param_dtype(variables).name,
        "formats": formats,
    }
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    # A checkpoint that declares them tied may store an embedding and another head.
    config = tie_like(config, model.config)
    for name, content in ((FLAX, fields), (CONFIG, config)):
        write_json(folder / name, content)
    carry_tokenizer(source, folder)
    with _checkpointer(alone=True) as checkpointer:
        checkpointer.save((folder / _STATE).absolute(), state)


def read_fields(
    folder: Path,
) -> tuple[dict[str, Any], str, dict[str, QuantConfig]]:
    """Reads the config, the dtype and the format of each quantised layer.

    Raises:
        CheckpointError: the files are damaged, or belong to different models.
        UnsupportedCheckpointError: a newer jaxbnb wrote them.
    """
    others = [name for pair in SOURCES for name in pair if (folder / name).exists()]
    if others:
        # Older versions could leave files of a conversion that was killed.
        raise CheckpointError(
            f"{folder} holds a model's state ({FLAX}) and {others[0]}, which may be "
            "another model's: no conversion writes both. Convert the checkpoint again"
        )
    config = read_config(folder)
    fields = parse_json(folder / FLAX, (folder / FLAX).read_bytes())
    check_version(folder / FLAX, fields.get("format_version"), VERSION)
    try:
        dtype = jnp.dtype(fields["dtype"]).name
        formats = {
            path: QuantConfig.from_dict(format)
            for path, format in fields["formats"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / FLAX} is not what jaxbnb wrote: {error!r}; convert the "
            "checkpoint again"
        ) from error
    return config, dtype, formats


def restore_state(
    folder: Path, abstract: Mapping[Any, Any], shardings: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Reads the values of a model's variables, by path.

    Raises:
        CheckpointError: Orbax does not find the model's arrays.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(leaf: Any, sharding: Any = device) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    targets = {
        ".".join(path): jax.tree.map(
            target, value, *[shardings[path]] if shardings else []
        )
        for path, value in abstract.items()
    }
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.restore((folder / _STATE).absolute(), targets)
    # Orbax may raise any error of the libraries that it uses.
    except Exception as error:
        raise CheckpointError(
            f"{folder} is damaged: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    return {path: found[".".join(path)] for path in abstract}


def _checkpointer(*, alone: bool = False) -> Any:
    """Returns Orbax's checkpointer; ``alone`` if only this process uses it."""
    orbax = import_extra(
        "orbax.checkpoint", needed_by="jaxbnb.models.convert_to_flax", extra="convert"
    )
    if not alone or jax.process_count() == 1:
        return orbax.StandardCheckpointer()
    index = jax.process_index()
    options = orbax.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix="alone"
    )
    return orbax.StandardCheckpointer(multiprocessing_options=options)
