"""`jaxbnb finetune`: trains a model on the user's data."""

import argparse
import dataclasses
import itertools
import re
import sys
import warnings
from typing import Any

from jaxbnb.cli import _model, _processes
from jaxbnb.finetune import (
    Batches,
    ConfigError,
    Encoder,
    TrainConfig,
    load_dataset,
    read_config,
    show_example,
    train,
)
from jaxbnb_kernels import verification

# Arguments that are not fields of a TrainConfig.
_OTHERS = ("verb", "config", "show_example", *_processes.NAMES)
# The status of a run that Ctrl-C ended, as of any other verb.
_INTERRUPTED = 130
# The status of a run that SIGTERM ended, EX_TEMPFAIL in sysexits.h: try again.
_PREEMPTED = 75


def run(args: argparse.Namespace) -> int:
    """Trains, or shows an example.

    Returns:
        The exit status: 0, 1 after ``error: ...``, or, after a checkpoint, 130 if
        Ctrl-C ended the run and 75 if SIGTERM did.
    """
    warnings.showwarning = _show_warning
    try:
        config = _read_config(args)
        _processes.join(args)
        if "show_example" in args:
            _show_example(config, args.show_example)
            return 0
        verification.verify_if_needed(_model.announce_checks, _model.report_check)
        result = train(config)
    except BrokenPipeError:
        raise
    except (*_model.ERRORS, *_processes.ERRORS, FloatingPointError) as error:
        _processes.report(error, _name_options)
        return _processes.leave(1)
    if result.is_complete:
        return _processes.leave(0)
    return _processes.leave(_PREEMPTED if result.is_preempted else _INTERRUPTED)


def _read_config(args: argparse.Namespace) -> TrainConfig:
    """Returns the config of a file, if one is given, changed by the arguments."""
    fields = read_config(args.config) if "config" in args else {}
    given = {name: x for name, x in vars(args).items() if name not in _OTHERS}
    if "show_example" in args:
        # It writes nothing.
        given.setdefault("out", ".")
    if given.get("model") is None:
        given.pop("model", None)
    for name in ("data", "eval"):
        if len(given.get(name) or ()) == 1:
            (given[name],) = given[name]
    if "target_modules" in given:
        given["target_modules"] = _read_modules(given["target_modules"])
    # Each says how long to train: the argument counts, not the file.
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given and other not in given:
            fields.pop(other, None)
    fields |= given
    unknown = set(fields) - {field.name for field in dataclasses.fields(TrainConfig)}
    missing = [
        name
        for name, field in (("MODEL", "model"), ("--data", "data"), ("--out", "out"))
        if not fields.get(field)
    ]
    # An unknown name may be a typing error of a missing one.
    if missing and not unknown:
        raise ConfigError(f"{' and '.join(missing)} must be given, or in --config")
    return TrainConfig.from_dict(fields)


def _read_modules(words: list[str]) -> list[str] | str:
    """Returns names of layers; a single word may also mean a set of them.

    Example:
        >>> _read_modules(["q_proj"]), _read_modules(["all-linear"])
        (['q_proj'], 'all-linear')
        >>> _read_modules([".*attn.*"])
        '.*attn.*'
    """
    is_name = re.fullmatch(r"[\w.]+", words[0])
    return words[0] if len(words) == 1 and not is_name else words


def _show_example(config: TrainConfig, count: int) -> None:
    """Prints the first windows of the training data, document by document."""
    source: Any = list(config.data) if isinstance(config.data, tuple) else config.data
    tokenizer = config.load_tokenizer()
    dataset = load_dataset(source, on_error=config.on_error)
    batches = Batches(
        dataset,
        Encoder(tokenizer, loss_on=config.loss_on),
        batch_size=1,
        seq_length=config.seq,
        packing=config.packing,
        seed=config.seed,
        epochs=1,
        truncation=config.truncation,
    )
    for number, batch in enumerate(itertools.islice(batches, count), 1):
        where = f"window {number}, " if count > 1 else ""
        # In a single window, each row has one document.
        titles = [f"{where}{dataset.describe(row)}" for row in batch.rows]
        show_example(batch, tokenizer, titles=titles)


def _name_options(message: str) -> str:
    """Names arguments of Python as the options of the command line.

    Example:
        >>> _name_options("set truncation='start', or raise seq_length")
        'set --truncation start, or raise --seq'
        >>> _name_options("save_every must be at least 1, got 0")
        '--save-every must be at least 1, got 0'
    """
    names = "|".join(field.name for field in dataclasses.fields(TrainConfig))
    message = re.sub(
        rf"^({names})(?= must be )",
        lambda found: f"--{found[1].replace('_', '-')}",
        message,
    )
    message = re.sub(r"\bseq_length\b", "--seq", message)
    return re.sub(
        r"\b(on_error|truncation|loss_on|quant|dtype)='(\w+)'",
        lambda found: f"--{found[1].replace('_', '-')} {found[2]}",
        message,
    )


def _show_warning(message, category, *_, **__) -> None:
    # All processes have the same reasons to warn.
    if _processes.is_first():
        print(f"warning: {_name_options(str(message))}", file=sys.stderr)
