"""The arguments of the verbs that train, plan a run, or use several processes."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxbnb.cli._choices import DTYPES, MODEL, PLANNED_GPUS, REMAT, SHARDINGS


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``jaxbnb plan``."""
    parser.add_argument(
        "model",
        help="a folder with a config.json, a config.json, a GGUF file, or a model's "
        "name on the hub; no weights are read",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"GPU: {', '.join(PLANNED_GPUS)}",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of any other GPU, e.g. 24GiB, instead of --gpu",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="number of GPUs; default: as many as the sizes of --mesh say, or 1",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="how they are used, such as data=2,fsdp=4 or fsdp; default: fsdp",
    )
    parser.add_argument(
        "--sharding",
        choices=SHARDINGS,
        help="what the mesh is for, and the name of its one axis without --mesh",
    )
    parser.add_argument(
        "--quant",
        type=_or_none(str),
        default="nf4",
        metavar="FORMAT",
        help="format of the frozen linear layers; default: nf4; stored: that of the "
        "file; none: leave them",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="quantise the absmax as well"
    )
    parser.add_argument(
        "--optimizer",
        default="paged_adamw8bit",
        metavar="NAME",
        help="optimizer; default: paged_adamw8bit",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="rows, on all GPUs together; default: one on each of those that divide "
        "rows",
    )
    parser.add_argument(
        "--seq", type=int, default=2048, metavar="S", help="tokens; default: 2048"
    )
    parser.add_argument("--remat", default="layer", metavar="HOW", help=REMAT)
    parser.add_argument(
        "--rank",
        type=_or_none(int),
        default=16,
        metavar="R",
        help="rank of the adapters; default: 16; none: train all parameters",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of everything else; default: bfloat16, float16 on a T4",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="have XLA compile the step for this GPU, for its exact peak; default: if "
        "JAX's CUDA plugin is installed",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also run two steps on the GPU of this machine, and print their peak",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the memory to a PNG or SVG file"
    )


def find_plan_conflict(args: argparse.Namespace) -> str | None:
    """Says which arguments of `add_plan` contradict each other; None if none do."""
    if bool(args.gpu) == bool(args.memory):
        return "give one of --gpu and --memory"
    if args.measure and (args.mesh or (args.devices or 1) > 1):
        return "--measure runs a step on one GPU: leave out --devices and --mesh"
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        return f"--plot writes PNG or SVG: {args.plot} must end in .png or .svg"
    return None


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``jaxbnb finetune``."""
    # Nothing has a default here: those of TrainConfig apply, or a file's.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("model", nargs="?", help=MODEL)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="a YAML or JSON file with options")
    add("--out", metavar="DIR", help="folder to write everything to")
    add(
        "--show-example",
        nargs="?",
        const=1,
        type=_read_count,
        metavar="N",
        help="print the first window of the training data, or the first N, with the "
        "tokens that the model learns to predict, and end",
    )
    data = parser.add_argument_group("options of the data")
    for name, what in (("data", "training"), ("eval", "held-out")):
        data.add_argument(
            f"--{name}",
            nargs="+",
            metavar="FILE",
            help=f"{what} data: jsonl, json, txt, md or parquet, with rows of text, "
            "prompt and completion, or messages",
        )
    _add_fields(
        data,
        {
            "seq": (int, "S", "number of tokens in a window; default: 1024"),
            "loss_on": (
                str,
                "WHAT",
                "targets: completion (default; in chats, the assistant's turns), last "
                "(the assistant's last turn), all",
            ),
            "truncation": (
                str,
                "HOW",
                "what happens to long chats and completions: end (default: cut off "
                "there), start, error, skip",
            ),
            "on_error": (str, "HOW", "bad rows: raise (default) or skip"),
            "tokenizer": (str, "PATH", "folder or GGUF file; default: the model's"),
        },
    )
    _add_switch(data, "packing", "put several examples into one window; default: yes")
    run = parser.add_argument_group("options of the run")
    _add_fields(
        run,
        {
            "steps": (int, "N", "number of steps; default: one epoch"),
            "epochs": (int, "N", "number of passes over the data"),
            "batch": (int, "B", "number of windows in a micro-batch; default: 4"),
            "accumulate": (int, "K", "number of micro-batches in a step; default: 4"),
            "lr": (float, "X", "peak learning rate; default: 2e-4, with --full 2e-5"),
            "schedule": (str, "NAME", "cosine (default), linear or constant"),
            "warmup": (float, "X", "share of the steps that warm up; default: 0.03"),
            "optimizer": (str, "NAME", "default: paged_adamw8bit"),
            "weight_decay": (float, "X", "default: 0"),
            "max_grad_norm": (_or_none(float), "X", "default: 1; none: do not clip"),
            "neftune_alpha": (float, "X", "noise on embeddings (NEFTune)"),
            "save_every": (int, "N", "steps between checkpoints; default: a tenth"),
            "eval_every": (int, "N", "steps between evaluations; default: save_every"),
            "keep": (int, "N", "number of checkpoints to keep; default: 2"),
            "patience": (int, "N", "evaluations without a lower loss before it ends"),
            "max_bad_steps": (
                int,
                "N",
                "steps in a row without a finite loss; default: 5",
            ),
            "seed": (int, "N", "default: 0"),
        },
    )
    run.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in DIR"
    )
    run.add_argument(
        "--prompts",
        nargs="*",
        metavar="TEXT",
        help="prompts to answer before and after; default: two from the data",
    )
    run.add_argument(
        "--report-to",
        nargs="+",
        metavar="NAME",
        help="also log to tensorboard, wandb or mlflow",
    )
    run.add_argument("--remat", metavar="HOW", help=REMAT)
    run.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices of all processes, such as data=2,fsdp=4 or fsdp; default: one "
        "device, or in several processes data: each has the whole model",
    )
    what = parser.add_argument_group("options of what is trained")
    _add_fields(
        what,
        {
            "quant": (
                _or_none(str),
                "FORMAT",
                "format of the frozen linear layers; default: nf4; stored: that of the "
                "file; none: leave them",
            ),
            "dtype": (str, "DTYPE", "bfloat16 (default) or float32"),
            "adapter": (
                str,
                "DIR",
                "saved adapter to go on from, instead of a new one",
            ),
            "rank": (int, "R", "rank of the adapters; default: 16"),
            "alpha": (float, "X", "numerator of the adapters' scale; default: 2 R"),
            "dropout": (float, "X", "share of the adapters' inputs that is dropped"),
        },
    )
    what.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="names of layers to adapt, or one regular expression of their whole "
        "paths; default: all linear ones",
    )
    what.add_argument(
        "--modules-to-save",
        nargs="+",
        metavar="NAME",
        help="modules to train in full, e.g. lm_head",
    )
    what.add_argument(
        "--new-tokens",
        nargs="+",
        metavar="TEXT",
        help="texts that become tokens of their own, with rows to train",
    )
    what.add_argument("--bias", metavar="WHICH", help="none (default), all, lora_only")
    for flag, text in (
        ("--layers-to-transform", "layers to adapt, with --target-modules"),
        ("--trainable-tokens", "tokens with embeddings to train"),
    ):
        what.add_argument(flag, nargs="+", type=int, metavar="N", help=text)
    _add_switch(what, "double_quant", "quantise the absmax as well; default: yes")
    what.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    what.add_argument(
        "--full",
        action="store_true",
        help="train all parameters; needs --quant none",
    )
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of a run in several processes."""
    group = parser.add_argument_group("options of a run in several processes")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, the same in all processes; auto: what JAX detects "
        "under SLURM, Open MPI and Kubernetes",
    )
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="number of processes"
    )
    group.add_argument(
        "--process-id", type=int, metavar="I", help="number of this one, from 0"
    )


def find_processes_conflict(args: argparse.Namespace) -> str | None:
    """Says what is wrong with the arguments of `add_processes`."""
    coordinator = getattr(args, "coordinator", None)
    count = getattr(args, "num_processes", None)
    number = getattr(args, "process_id", None)
    if coordinator is None:
        if (count, number) != (None, None):
            return "--num-processes and --process-id need --coordinator"
        return None
    if coordinator != "auto" and not re.fullmatch(r".+:\d{1,5}", coordinator):
        return f"--coordinator is HOST:PORT or auto, got {coordinator}"
    if (count is None) != (number is None):
        return "--num-processes and --process-id are given together, or neither"
    if count is not None and number is not None and not 0 <= number < count:
        return f"--process-id is from 0 to {count - 1}, got {number}"
    return None


def _add_fields(group: Any, fields: dict[str, tuple[Any, str, str]]) -> None:
    for name, (kind, metavar, text) in fields.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _add_switch(group: Any, name: str, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)


def _read_count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse
