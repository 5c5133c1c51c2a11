"""TrainConfig: everything that decides a run of `train`, checked before it starts."""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from jaxbnb.convert import Tokenizer, add_tokens, load_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.core.extras import import_extra
from jaxbnb.finetune._optimizer_names import find_optimizer
from jaxbnb.lora import LoraConfig
from jaxbnb.models.load import STORED
from jaxbnb.nnx import Remat
from jaxbnb.sharding.layout import MESH_AXES

# The default of QLoRA's paper, and of TRL's SFTConfig.
_LR_ADAPTERS: Final = 2e-4
_LR_FULL: Final = 2e-5


class ConfigError(ValueError):
    """A value of a `TrainConfig` that no run can have; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run of `train`.

    The fields have the names of the options of ``jaxbnb finetune``. By default a run is
    QLoRA: NF4 with double quantisation, bfloat16, adapters of rank 16 on all linear
    layers, ``paged_adamw8bit``, a cosine schedule with warm-up, and clipping.

    Attributes:
        model: folder or GGUF file of the model.
        out: folder for everything that the run writes.
        data: file with the training data, or several; see `load_dataset`. None if
            `train` gets rows.
        eval: file with held-out data, or several; None for no evaluation.
        tokenizer: folder or GGUF file of the tokenizer; None for the model's.
        steps: number of steps; None for whole epochs.
        epochs: number of passes over the data, instead of ``steps``; 1 if both are
            None.
        batch: number of windows in a micro-batch.
        accumulate: number of micro-batches that make one step.
        seq: number of tokens in a window.
        packing: whether several examples share a window.
        loss_on: "completion", "last" or "all"; see `Encoder`.
        truncation: "end", "start", "error" or "skip"; see `Batches`.
        on_error: "raise" or "skip", for bad rows; see `load_dataset`.
        quant: format of the frozen linear layers, e.g. "nf4"; "stored" for the format
            that the checkpoint stores them in, see `jaxbnb.load_pretrained`; None to
            leave them.
        double_quant: whether to quantise the absmax as well. Stored formats stay as
            they are.
        dtype: dtype of everything that is not quantised, "bfloat16" or "float32".
        full: train all parameters instead of adapters. ``quant`` must be None. In
            bfloat16, new values are rounded up or down at random, see
            `jaxbnb.optim.stochastic_rounding`.
        adapter: folder of a saved adapter to go on from, instead of a new one; its
            files decide its rank, its layers and everything else about it.
        rank: rank of the adapters.
        alpha: numerator of the adapters' scale; None for twice the rank.
        dropout: share of the adapters' inputs that is dropped in training.
        target_modules: layers to adapt, see `jaxbnb.lora.LoraConfig`.
        dora: learn the norms of columns too (DoRA).
        modules_to_save: modules to train in full, such as ``("lm_head",)``; or None.
        bias: biases to train: "none", "all" or "lora_only".
        layers_to_transform: numbers of the layers to adapt, if ``target_modules`` is a
            list; None for all.
        trainable_tokens: ids of tokens with embeddings to train; None for none.
        new_tokens: texts that become tokens of their own, such as ``("<|think|>",)``;
            or None. Their rows of the embedding and the head are trained.
        optimizer: name of an optimizer of `jaxbnb.optim`, such as "paged_adamw8bit" or
            "lion8bit", or "adamw" with state in float32.
        lr: peak learning rate; None for 2e-4 with adapters, and 2e-5 with ``full``. The
            config then has that number.
        schedule: what follows the warm-up: "cosine" to zero, "linear" to zero, or
            "constant".
        warmup: share of the steps in which the learning rate rises.
        weight_decay: strength of the decay. Norms and biases do not decay.
        max_grad_norm: norm that gradients are scaled down to; None to leave them.
        neftune_alpha: strength of the noise on embeddings (NEFTune), e.g. 5; None for
            none.
        remat: what the backward pass keeps of the layers, and computes the rest again:
            the input of each, "layer"; also the results of its products, "products";
            the input of every fourth, 4; all inputs, on the host, "offload"; or
            everything, "none". True and False are the first and the last.
        mesh: how the devices of all processes are used, such as "data=2,fsdp=4": the
            axes of a mesh with their sizes, where one size may be left out. See
            `jaxbnb.sharding` for the axes. None for the first device of a single
            process, and for "data" in several: each device has the whole model.
        save_every: number of steps between checkpoints; None for a tenth of the run.
        eval_every: number of steps between evaluations; None for ``save_every``.
        keep: number of checkpoints to keep.
        patience: number of evaluations without a lower loss that end the run; None to
            never stop early.
        max_bad_steps: number of steps in a row without a finite loss that end the run.
        prompts: prompts that the report answers before and after. None for two from
            the data, ``()`` for none.
        report_to: "tensorboard", "wandb" and "mlflow"; each needs its package.
        seed: seed of adapters, order, dropout and rounding.
        resume: continue from the last checkpoint in ``out``.

    Raises:
        ConfigError: a value is of the wrong type, unknown or out of range, or two
            contradict each other.

    Example:
        >>> from jaxbnb.finetune import TrainConfig
        >>> config = TrainConfig(model="SmolLM2", data="chats.jsonl", out="run")
        >>> config.batch * config.accumulate, config.optimizer
        (16, 'paged_adamw8bit')
        >>> config.lr
        0.0002
        >>> TrainConfig.from_dict(config.to_dict()) == config
        True
    """

    model: str
    out: str
    data: str | tuple[str, ...] | None = None
    eval: str | tuple[str, ...] | None = None
    tokenizer: str | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int = 4
    accumulate: int = 4
    seq: int = 1024
    packing: bool = True
    loss_on: Literal["completion", "last", "all"] = "completion"
    truncation: Literal["end", "start", "error", "skip"] = "end"
    on_error: Literal["raise", "skip"] = "raise"
    quant: str | None = "nf4"
    double_quant: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    full: bool = False
    adapter: str | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    layers_to_transform: tuple[int, ...] | None = None
    trainable_tokens: tuple[int, ...] | None = None
    new_tokens: tuple[str, ...] | None = None
    optimizer: str = "paged_adamw8bit"
    lr: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    neftune_alpha: float | None = None
    remat: bool | int | str = True
    mesh: str | None = None
    save_every: int | None = None
    eval_every: int | None = None
    keep: int = 2
    patience: int | None = None
    max_bad_steps: int = 5
    prompts: tuple[str, ...] | None = None
    report_to: tuple[str, ...] = ()
    seed: int = 0
    resume: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), _HINTS[field.name])
            object.__setattr__(self, field.name, value)
        if self.lr is None:
            object.__setattr__(self, "lr", _LR_FULL if self.full else _LR_ADAPTERS)
        for name, (is_good, meaning) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_good(value):
                raise ConfigError(f"{name} must be {meaning}, got {value!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs both say how long to train: give one")
        if self.full and self.quant is not None:
            raise ConfigError(
                f"full trains all parameters, and quant={self.quant!r} freezes the "
                "linear layers: give quant=None (--quant none) with it, or leave out "
                "full"
            )
        if self.adapter is not None:
            self._check_adapter(self.adapter)
        read_remat(self.remat)
        read_mesh(self.mesh or "data")
        if self.full and self.dora:
            raise ConfigError("dora is a kind of adapter, and full has no adapters")
        if self.patience is not None and self.eval is None:
            raise ConfigError("patience counts evaluations: give eval as well")
        if self.quant is not None:
            try:
                self.quant_config()
            except ValueError as error:
                raise ConfigError(f"quant={self.quant!r}: {error}") from error
        if not self.full:
            try:
                self.lora_config()
            except ValueError as error:
                raise ConfigError(str(error)) from error
        try:
            find_optimizer(self.optimizer)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name in self.report_to:
            if name not in REPORTERS:
                raise ConfigError(
                    f"report_to must be among {', '.join(REPORTERS)}, got {name!r}"
                )

    def _check_adapter(self, folder: str) -> None:
        if self.full:
            raise ConfigError(
                f"full trains all parameters, and adapter={folder!r} goes on from an "
                "adapter: leave out one of them"
            )
        said = [name for name in _OF_ADAPTER if getattr(self, name) != _DEFAULTS[name]]
        if said:
            raise ConfigError(
                f"the files of adapter={folder!r} decide {' and '.join(said)}: leave "
                f"{'it' if len(said) == 1 else 'them'} out"
            )

    def quant_config(self) -> QuantConfig | str | None:
        """The format of the frozen linear layers, as `load_pretrained` takes it."""
        if self.quant is None or self.quant == STORED:
            return self.quant
        double_quant = self.double_quant and self.quant != "llm_int8"
        return QuantConfig(self.quant, double_quant=double_quant)

    def lora_config(self) -> LoraConfig:
        """The adapters."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_dora=self.dora,
            modules_to_save=self.modules_to_save,
            bias=self.bias,
            layers_to_transform=self.layers_to_transform,
            trainable_token_indices=self.trainable_tokens,
        )

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer, with the new tokens.

        Raises:
            ConfigError: it has one of them already.
        """
        tokenizer = load_tokenizer(self.tokenizer or self.model)
        try:
            return add_tokens(tokenizer, self.new_tokens or ())
        except ValueError as error:
            raise ConfigError(
                f"new_tokens: {error}; trainable_tokens trains tokens by their ids"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, for JSON or YAML."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """Makes a config of plain values.

        Raises:
            ConfigError: a field is unknown or missing, or a value is wrong.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f"; perhaps {near[0]}" if near else ""
                raise ConfigError(f"a config has no field {name!r}{hint}")
        missing = [name for name in ("model", "out") if not fields.get(name)]
        if missing:
            raise ConfigError(f"a config needs {' and '.join(missing)}")
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the config as YAML, or as JSON if the name ends in ``.json``."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            yaml = import_extra("yaml", needed_by="a YAML config", extra="finetune")
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        path.write_text(text, encoding="utf-8")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields of a config from a YAML or JSON file.

    Raises:
        ConfigError: the file does not hold an object.
        FileNotFoundError: there is no such file.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        parse, error_type = json.loads, json.JSONDecodeError
    else:
        yaml = import_extra("yaml", needed_by="a YAML config", extra="finetune")
        parse, error_type = yaml.safe_load, yaml.YAMLError
    try:
        fields = parse(text)
    except error_type as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold names and values, such as 'lr: 0.0002'")
    return fields


REPORTERS = ("tensorboard", "wandb", "mlflow")


def read_remat(value: bool | int | str) -> bool | Remat:
    """Returns the gradient checkpointing that an option names.

    Raises:
        ConfigError: it names none.

    Example:
        >>> read_remat("layer"), read_remat("none")
        (True, False)
        >>> read_remat("products")
        Remat(every=1, offload=False, products=True)
    """
    if isinstance(value, bool):
        return value
    text = str(value)
    if text in ("layer", "none"):
        return text == "layer"
    if text in ("offload", "products"):
        return Remat(**{text: True})
    if text.isdecimal() and int(text) > 0:
        return Remat(every=int(text))
    raise ConfigError(
        f"remat must be layer, products, offload, none or a number, got {value!r}"
    )


def read_mesh(text: str) -> dict[str, int | None]:
    """Returns the axes of a mesh and their sizes; None for the size that is left out.

    Raises:
        ConfigError: an axis is unknown or comes twice, or a size is wrong.

    Example:
        >>> read_mesh("data=2,fsdp")
        {'data': 2, 'fsdp': None}
    """
    axes: dict[str, int | None] = {}
    for part in text.split(","):
        name, has_size, size = part.strip().partition("=")
        is_size = size.isdecimal() and int(size) > 0
        if name not in MESH_AXES or name in axes or (has_size and not is_size):
            raise ConfigError(
                f"mesh is a list of axes from {', '.join(MESH_AXES)}, each once, with "
                f"sizes, such as data=2,fsdp=4; got {text!r}"
            )
        axes[name] = int(size) if has_size else None
    if list(axes.values()).count(None) > 1:
        raise ConfigError(f"mesh leaves out more than one size: {text!r}")
    return axes


def mesh_sizes(text: str, devices: int | None = None) -> dict[str, int]:
    """Returns the sizes of a mesh that is written as `TrainConfig.mesh` is.

    Args:
        text: the axes with their sizes; one size may be left out.
        devices: number of devices of the mesh; None for as many as the sizes say.

    Raises:
        ConfigError: the text is not that of a mesh, or its sizes do not multiply to the
            number of devices.

    Example:
        >>> mesh_sizes("data=2,fsdp", devices=8)
        {'data': 2, 'fsdp': 4}
    """
    axes = read_mesh(text)
    known = math.prod(size for size in axes.values() if size is not None)
    devices = known if devices is None else devices
    sizes = {
        name: devices // known if size is None else size for name, size in axes.items()
    }
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh is {text}, and the number of devices is {devices}: its sizes must "
            "multiply to that"
        )
    return sizes


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Returns a value as its field has it; lists become tuples, 1 becomes 1.0.

    Raises:
        ConfigError: the value has another type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if float in options and not isinstance(value, bool):
        # YAML 1.1 reads 2e-4, without a dot, as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, int):
            return float(value)
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple and isinstance(value, list | tuple):
            kind = typing.get_args(option)[0]
            items = tuple(
                os.fspath(x) if isinstance(x, os.PathLike) else x for x in value
            )
            if all(type(item) is kind for item in items):
                return items
        elif origin is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif origin is None and type(value) is option:
            return value
    raise ConfigError(f"{name} must be {_describe(options)}, got {value!r}")


def _describe(options: tuple[Any, ...]) -> str:
    names = []
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple:
            kind = "strings" if typing.get_args(option)[0] is str else "whole numbers"
            names.append(f"a list of {kind}")
        elif origin is Literal:
            names += [repr(choice) for choice in typing.get_args(option)]
        else:
            names.append(_NAMES.get(option, str(option)))
    return " or ".join(names)


_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}
_HINTS = typing.get_type_hints(TrainConfig)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
# What the files of an adapter decide.
_OF_ADAPTER = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "dora",
    "modules_to_save",
    "bias",
    "layers_to_transform",
    "trainable_tokens",
    "new_tokens",
)
_AT_LEAST_1: tuple[Callable[[Any], bool], str] = (lambda x: x >= 1, "at least 1")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (
    lambda x: 0 <= x < math.inf,
    "at least 0",
)
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            *("steps", "epochs", "batch", "accumulate", "rank", "save_every"),
            *("eval_every", "keep", "patience", "max_bad_steps"),
        ),
        _AT_LEAST_1,
    ),
    "seq": (lambda x: x >= 2, "at least 2"),
    "lr": (lambda x: 0 < x < math.inf, "above 0"),
    "warmup": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "max_grad_norm": (lambda x: x > 0, "above 0"),
    "neftune_alpha": (lambda x: 0 < x < math.inf, "above 0"),
    **dict.fromkeys(("weight_decay", "seed"), _NOT_NEGATIVE),
}
