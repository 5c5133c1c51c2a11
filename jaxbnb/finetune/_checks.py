"""What stands in the way of a run, found before its model is loaded."""

import hashlib
import importlib.metadata
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
from flax import nnx

from jaxbnb.convert import CheckpointError, open_checkpoint
from jaxbnb.convert.huggingface_folder import read_config
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.extras import import_extra
from jaxbnb.data import Dataset, load_dataset
from jaxbnb.finetune._config import ConfigError, TrainConfig
from jaxbnb.finetune._metrics import import_package, read_metrics
from jaxbnb.finetune._new_tokens import add_adapters, make_room
from jaxbnb.models.families import FAMILIES
from jaxbnb.models.flax_folder import is_flax_folder
from jaxbnb.models.load import STORED, abstract_pretrained
from jaxbnb.sharding.activations import batch_axes

CONFIG_FILE: Final = "config.yaml"
# Fields that a run may change when it goes on.
_MAY_CHANGE: Final = (
    *("resume", "out", "keep", "prompts", "report_to", "remat", "mesh"),
)
# Fields that may differ between the hosts of a run.
_PATHS: Final = ("model", "adapter", "data", "eval", "tokenizer")


def open_data(
    name: str, path: Any, rows: Iterable[Any] | None, config: TrainConfig
) -> Dataset:
    """Opens rows, or the file that a config names, for training or evaluation."""
    if rows is not None:
        if path is not None:
            raise ConfigError(f"the config names a file as {name}, and rows are given")
        path = rows
    if path is None:
        raise ConfigError(f"there is nothing to train on: give {name}")
    if isinstance(path, Dataset):
        return path
    source: Any = list(path) if isinstance(path, tuple) else path
    return load_dataset(source, on_error=config.on_error)


def check_packages(config: TrainConfig) -> None:
    """Raises ImportError for a missing package, even if only the end needs it."""
    for package in ("rich", "matplotlib"):
        import_extra(package, needed_by="jaxbnb.finetune.train", extra="finetune")
    for service in config.report_to:
        import_package(service)


def check_folder(config: TrainConfig) -> None:
    """Raises FileExistsError where another run's files are.

    A run that failed before its first step has left nothing to go on with.
    """
    out = Path(config.out)
    has_begun = (out / CONFIG_FILE).exists()
    has_run = any(line["step"] > 0 for line in read_metrics(out))
    if has_run and not config.resume:
        raise FileExistsError(
            f"{out} holds a run already. Give resume (--resume) to go on with it, or "
            "choose another folder"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, and a run writes a folder")
    if out.exists() and not has_begun and any(out.iterdir()):
        raise FileExistsError(
            f"{out} has files that are not a run's; choose another folder"
        )


def check_rows(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> None:
    """Warns of a batch with rows that do not divide among the devices of a mesh."""
    if mesh is None:
        return
    parts = math.prod(mesh.shape[axis] for axis in batch_axes(mesh) or ())
    more = -config.batch % parts
    if more:
        warnings.warn(
            f"batch is {config.batch}, and mesh divides rows among {parts} devices, so "
            f"rows of padding in each batch: {more}. Give a multiple of {parts}",
            stacklevel=2,
        )


def check_length(config: TrainConfig) -> int | None:
    """Checks that a model is a decoder, and takes windows as long as the run's.

    Returns:
        The largest number of tokens that it takes; None if its files do not say.

    Raises:
        ConfigError: it does not.
    """
    is_flax = is_flax_folder(config.model)
    folder = Path(config.model)
    fields = read_config(folder) if is_flax else open_checkpoint(folder).config
    kind = fields.get("model_type")
    if kind in FAMILIES and FAMILIES[kind].kind != "decoder":
        raise ConfigError(
            f"{config.model} is a {kind}, an {FAMILIES[kind].kind}, and a run trains "
            "decoders; jaxbnb.finetune.fit trains it from Python"
        )
    if is_flax:
        return None
    longest = fields.get("max_position_embeddings")
    if isinstance(longest, int) and config.seq > longest:
        raise ConfigError(
            f"seq is {config.seq}, and {config.model} takes at most {longest} tokens "
            "(max_position_embeddings)"
        )
    return longest if isinstance(longest, int) else None


def check_model(config: TrainConfig, new_ids: Sequence[int]) -> int:
    """Checks that a model takes the format and the adapters. Reads no weights.

    Args:
        config: the run's config.
        new_ids: ids of the new tokens.

    Returns:
        The number of the model's tokens, with the new ones.

    Raises:
        ConfigError: it does not.
    """
    stored = _list_stored_formats(config.model)
    if config.full and stored:
        raise ConfigError(
            f"full trains all parameters, and those that {config.model} stores as "
            f"{' and '.join(stored)} stay frozen: give the checkpoint before it was "
            "quantised, or one that `jaxbnb convert --dtype` has decoded"
        )
    if isinstance(config.quant_config(), QuantConfig) and stored:
        raise ConfigError(
            f"{config.model} is quantised already, as {' and '.join(stored)}: give "
            f"quant={STORED!r} to train over its weights as they are"
        )
    try:
        model = abstract_pretrained(
            config.model, quant=config.quant_config(), dtype=config.dtype
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.quant == STORED and not list_formats(model):
        kinds = sorted({*open_checkpoint(config.model).decoded.values()})
        raise ConfigError(
            f"{config.model}, which stores {' and '.join(kinds)}, has no linear layer "
            "that can stay as it is stored: give another format, such as quant='nf4', "
            "to quantise them again"
        )
    vocab_size = max(model.config.vocab_size, *(token + 1 for token in new_ids), 0)
    if config.full:
        return vocab_size
    graphdef, state = nnx.split(model)

    def add(state):
        model = nnx.merge(graphdef, state)
        make_room(model, new_ids)
        add_adapters(model, config, new_ids)

    try:
        nnx.eval_shape(add, state)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return vocab_size


def list_formats(model: nnx.Module) -> list[str]:
    """Returns the formats of a model's quantised layers, each once."""
    packed = jax.tree.leaves(
        nnx.state(model), is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    return sorted({x.quant_type for x in packed if isinstance(x, QuantizedArray)})


def _list_stored_formats(path: str) -> list[str]:
    """Returns the formats that a checkpoint is loaded in whatever is asked for."""
    if is_flax_folder(path):
        return list_formats(abstract_pretrained(path))
    quantized = open_checkpoint(path).quantized.values()
    return sorted({quant.quant_type for quant in quantized})


def describe_processes(
    config: TrainConfig, data: Dataset, eval_data: Dataset | None
) -> dict[str, Any]:
    """Returns what the processes of a run must have in common, by name.

    Paths of what is read may differ between hosts, its contents may not.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in _PATHS}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxbnb")}
    contents = {
        "the model": _hash_model(config.model),
        "the adapter": _hash_adapter(config.adapter) if config.adapter else None,
        "the data": data.fingerprint,
        "the held-out data": eval_data.fingerprint if eval_data else None,
    }
    return {**fields, **versions, **contents}


def _hash_model(path: str) -> str:
    """Returns a hash of a model's config and of its tensors' names and shapes."""
    if is_flax_folder(path):
        content = sorted(
            (file.name, file.read_bytes()) for file in Path(path).glob("*.json")
        )
    else:
        checkpoint = open_checkpoint(path)
        content = (checkpoint.config, dict(checkpoint.tensors))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _hash_adapter(folder: str) -> str:
    """Returns a hash of an adapter's files. They are small beside a model's."""
    hashes = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).glob("adapter_*"))
    ]
    return "".join(hashes)


def check_same(
    config: TrainConfig,
    saved: Mapping[str, Any],
    identity: Mapping[str, Any],
    saved_identity: Mapping[str, Any],
) -> None:
    """Raises ConfigError if a run would not go on as it began."""
    ours = {k: v for k, v in config.to_dict().items() if k not in _MAY_CHANGE}
    differing = [
        f"{name} is {value!r} and was {saved.get(name)!r}"
        for name, value in ours.items()
        if saved.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"the run in {config.out} began with another config: "
            f"{'; '.join(differing)}. Give the same values, or choose another folder"
        )
    if identity["data_fingerprint"] != saved_identity["data_fingerprint"]:
        raise ConfigError(
            f"the training data is not what the run in {config.out} began with: its "
            "contents have changed"
        )
