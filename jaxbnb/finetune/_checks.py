"""What stands in the way of a run, found before its model is loaded."""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from jaxbnb.convert import open_checkpoint
from jaxbnb.convert.huggingface_folder import read_config
from jaxbnb.data import Dataset, load_dataset
from jaxbnb.finetune._config import ConfigError, TrainConfig
from jaxbnb.finetune._metrics import read_metrics
from jaxbnb.models.families import FAMILIES
from jaxbnb.models.flax_folder import is_flax_folder

CONFIG_FILE: Final = "config.yaml"
# Fields that a run may change when it goes on.
_MAY_CHANGE: Final = (
    *("resume", "out", "keep", "prompts", "report_to", "remat", "mesh"),
)
# Fields that may differ between the hosts of a run.
_PATHS: Final = ("model", "data", "eval", "tokenizer")


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
    if out.exists() and not has_begun and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} has files that are not a run's; choose another folder"
        )


def check_length(config: TrainConfig) -> None:
    """Raises ConfigError for an encoder-decoder, or windows longer than it takes."""
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
        return
    longest = fields.get("max_position_embeddings")
    if isinstance(longest, int) and config.seq > longest:
        raise ConfigError(
            f"seq is {config.seq}, and {config.model} takes at most {longest} tokens "
            "(max_position_embeddings)"
        )


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
