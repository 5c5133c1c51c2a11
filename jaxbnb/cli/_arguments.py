"""The arguments of each verb.

This module does not import JAX, so a wrong argument is reported at once.
"""

import argparse
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from jaxbnb.cli._choices import (
    BENCHMARK_OPTIONS,
    BENCHMARKS,
    CALIBRATED,
    COMPRESSED,
    DTYPES,
    FORMATS,
    GGUF_TYPES,
    METHODS,
    MODEL,
    OPS,
    OPTIMIZERS,
    OUTPUTS,
    PLOTTED,
    STORED,
    VERBS,
)
from jaxbnb.cli._training_arguments import (
    add_finetune,
    add_plan,
    add_processes,
    find_plan_conflict,
    find_processes_conflict,
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of a verb.

    Returns:
        The arguments, and the name of the verb as ``verb``.

    Raises:
        SystemExit: with status 0 after ``--help`` and ``--version``; with status 2,
            after a message, for arguments that are wrong or contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog="jaxbnb", description="bitsandbytes for JAX: command-line tools."
    )
    parser.add_argument("--version", action="version", version=f"jaxbnb {_version()}")
    subparsers = parser.add_subparsers(dest="verb", metavar="<verb>", required=True)
    for verb, summary in VERBS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = subparsers.add_parser(verb, help=summary, description=description)
        if verb in _ADD:
            _ADD[verb](subparser)
    args = parser.parse_args(argv)
    conflict = _CONFLICTS[args.verb](args) if args.verb in _CONFLICTS else None
    if conflict is not None:
        subparsers.choices[args.verb].error(conflict)
    return args


def _version() -> str:
    try:
        return importlib.metadata.version("jaxbnb")
    except importlib.metadata.PackageNotFoundError:
        return "that is not installed"


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmarks",
        nargs="*",
        type=_make_check(BENCHMARKS, "benchmark"),
        metavar="NAME",
        help=f"benchmarks to run: {', '.join(BENCHMARKS)}; default: all",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the figures to a JSON file"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the figures of the benchmark parity, plan or scaling to PNG or SVG",
    )
    kernels = parser.add_argument_group("options of the benchmark kernels")
    kernels.add_argument(
        "--seconds",
        type=_parse_seconds,
        metavar="S",
        help="end within S seconds, and say what was left out; default: no limit",
    )
    kernels.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="write the records of verified kernels to a JSON file, instead of your "
        "own data folder",
    )
    kernels.add_argument(
        "--rehearse",
        action="store_true",
        help="run all of it on the CPU, with tiny arrays and without kernels",
    )
    parity = parser.add_argument_group("options of the benchmark parity")
    parity.add_argument(
        "--only",
        type=_parse_optimizers,
        metavar="OPTIMIZERS",
        help="optimizers to train with, e.g. adamw8bit,lion8bit; default: all",
    )
    parity.add_argument(
        "--adapters",
        action="store_true",
        help="train adapters of SmolLM2-135M in NF4 instead of a small model from "
        "scratch",
    )


def _make_check(names: Sequence[str], kind: str) -> Callable[[str], str]:
    # argparse's `choices` would refuse the empty list, which stands for all.
    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(
                f"no {kind} {name!r}; choose from {', '.join(names)}"
            )
        return name

    return check


def _parse_optimizers(text: str) -> list[str]:
    return list(map(_make_check(OPTIMIZERS, "optimizer"), text.split(",")))


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return seconds


def _find_bench_conflict(args: argparse.Namespace) -> str | None:
    for benchmark, names in BENCHMARK_OPTIONS.items():
        flags = [f"--{name}" for name in names if vars(args)[name]]
        if flags and args.benchmarks and benchmark not in args.benchmarks:
            return f"{' and '.join(flags)}: only for the benchmark {benchmark}"
    if args.plot and len({*PLOTTED} & {*args.benchmarks}) != 1:
        return f"--plot: name one benchmark that has a plot: {', '.join(PLOTTED)}"
    return None


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src",
        help="a Hugging Face folder (safetensors or pytorch_model.bin), a safetensors "
        "file, a GGUF file, or a model's name on the hub: org/name[@revision]",
    )
    parser.add_argument("dst", help="folder to write, or a file that ends in .gguf")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast floating-point tensors, and decode weights that bitsandbytes "
        "quantised; default: each tensor keeps its dtype, and quantised GGUF tensors "
        "become float32",
    )
    parser.add_argument(
        "--quant",
        choices=(*FORMATS, *GGUF_TYPES),
        metavar="FORMAT",
        help="quantise the linear layers: to nf4, fp4 or llm_int8; with --to "
        f"compressed-tensors to {', '.join(COMPRESSED)}; with --to flax to any of "
        f"{', '.join(FORMATS)}; with --to gguf to {', '.join(GGUF_TYPES)}",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="number of elements that share an absmax or scale, with --quant; default: "
        "the format's",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="quantise the absmax as well"
    )
    parser.add_argument(
        "--to",
        choices=OUTPUTS,
        metavar="KIND",
        help="kind of folder to write. safetensors (default) or, with --quant, "
        "bitsandbytes: transformers can load it. "
        "compressed-tensors, with --quant: vLLM can load it, too. flax: the NNX state "
        "of a model, written by Orbax, for load_pretrained. gguf, the default if DST "
        "ends in .gguf: a file for llama.cpp",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would happen to each tensor, and whether jaxbnb can load the "
        "model; write nothing",
    )
    parser.add_argument(
        "--report", action="store_true", help="print a line for each tensor, with SQNR"
    )
    add_processes(parser)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("dst", help="folder to write")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="text like that which the model will see: txt, md, jsonl, json or parquet",
    )
    parser.add_argument(
        "--random-tokens",
        action=argparse.BooleanOptionalAction,
        help="calibrate on random tokens, not on text; default: only for mse "
        "without --data, on 16 windows, if the model is a decoder",
    )
    parser.add_argument(
        "--quant",
        choices=CALIBRATED,
        default="nf4",
        help="format of the linear layers; default: nf4. int4 and int8 need --to "
        "compressed-tensors or flax",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="number of weights that share an absmax; default: 64. Others need --to "
        "compressed-tensors or flax",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="quantise the absmax as well"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype to calibrate in, and of everything that is not quantised; default: "
        "the checkpoint's",
    )
    parser.add_argument(
        "--to",
        choices=OUTPUTS[1:4],
        metavar="KIND",
        default=OUTPUTS[1],
        help="kind of folder to write. bitsandbytes (default): transformers can load "
        "it. compressed-tensors, for int4 and int8: vLLM can load it, too. flax: the "
        "NNX state of a model, written by Orbax, for load_pretrained",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="guided",
        help="guided (default) minimises the errors of layers, weighted by gradients; "
        "kronecker also lets outputs make up for each other; gptq does without "
        "gradients; mse searches only scales, and needs no data",
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="merge these LoRA adapters, written by jaxbnb or PEFT, before the codes "
        "are chosen",
    )
    parser.add_argument(
        "--adapter-quant",
        choices=FORMATS,
        metavar="FORMAT",
        help="merge the adapters into the model quantised as `jaxbnb finetune --quant "
        "FORMAT` does, and decoded; default: into the model as it is",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="number of windows to calibrate on; default: 64, or 16 for mse without "
        "--data",
    )
    for name, default, what in (
        ("seq", 512, "number of tokens in a window"),
        ("seed", 0, "seed of the windows, and of labels for gradients"),
        ("tune", 0, "number of steps that tune the absmax after the codes, by KL"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{what}; default: {default}",
        )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print a line for each matrix, not only for each kind of layer",
    )


def count_held_out(samples: int) -> int:
    """Returns the number of windows that ``jaxbnb calibrate`` holds out."""
    return max(4, samples // 8)


def _find_calibrate_conflict(args: argparse.Namespace) -> str | None:
    if args.samples is None:
        args.samples = 16 if args.method == "mse" and not args.data else 64
    if args.samples < 1:
        return f"--samples must be at least 1, got {args.samples}"
    if args.seq < 2:
        return f"--seq must be at least 2, got {args.seq}"
    if args.seed < 0:
        return f"--seed must be at least 0, got {args.seed}"
    if args.tune < 0:
        return f"--tune must be at least 0, got {args.tune}"
    if args.data and args.random_tokens:
        return "--random-tokens takes the place of --data: give one"
    if args.tune and not args.data:
        return "--tune needs --data; it does not use random tokens"
    if args.adapter_quant and not args.adapter:
        return "--adapter-quant needs an --adapter"
    is_theirs = args.quant in ("nf4", "fp4") and args.block_size in (None, 64)
    if args.to == "bitsandbytes" and not is_theirs:
        blocks = f" in blocks of {args.block_size}" if args.block_size else ""
        others = "compressed-tensors or flax" if args.quant in COMPRESSED else "flax"
        return (
            "bitsandbytes has nf4 and fp4, in blocks of 64; to write "
            f"{args.quant}{blocks}: --to {others}"
        )
    if args.to == "compressed-tensors" and args.quant not in COMPRESSED:
        return (
            f"compressed-tensors does not have {args.quant}: --quant int4 or int8, or "
            "--to bitsandbytes"
        )
    if args.method != "mse" and not (args.data or args.random_tokens):
        tokens = (args.samples + count_held_out(args.samples)) * args.seq
        return (
            f"--method {args.method} needs --data: files with about {tokens:,} tokens "
            f"({4 * tokens:,} characters of English), like the text that the model "
            "will see. Without any text, give --random-tokens, or else --method mse"
        )
    return None


def _find_convert_conflict(args: argparse.Namespace) -> str | None:
    if args.to is None and args.dst.endswith(".gguf"):
        args.to = "gguf"
    is_gguf = args.to == "gguf"
    if args.quant and is_gguf != (args.quant in GGUF_TYPES):
        choices = ", ".join(GGUF_TYPES if is_gguf else FORMATS)
        to = args.to or "safetensors"
        return f"--quant {args.quant}: --to {to} takes one of {choices}"
    if is_gguf and (args.double_quant or args.block_size):
        return "a type of GGUF has its own blocks: no --double-quant, no --block-size"
    if args.quant and args.to == "safetensors":
        return "--quant writes bitsandbytes' tensors: use --to bitsandbytes"
    if args.to in ("bitsandbytes", "compressed-tensors") and not args.quant:
        return f"--to {args.to} needs a --quant"
    if args.block_size is not None and not args.quant:
        return "--block-size needs a format to apply to: give --quant as well"
    if args.coordinator and args.to != "flax":
        return "only --to flax converts in several processes: leave out --coordinator"
    return _find_quant_conflict(args) or find_processes_conflict(args)


def _find_quant_conflict(args: argparse.Namespace) -> str | None:
    if args.double_quant and not args.quant:
        return "--double-quant needs a format to apply to: give --quant as well"
    if args.double_quant and args.quant == STORED:
        return "a file's own formats stay as they are: leave out --double-quant"
    if args.double_quant and args.quant == "llm_int8":
        return "llm_int8 has one absmax for a whole row: leave out --double-quant"
    return None


def _find_text_conflict(args: argparse.Namespace) -> str | None:
    if args.max_new_tokens < 1:
        return f"--max-new-tokens must be at least 1, got {args.max_new_tokens}"
    if not args.temperature >= 0:
        return f"--temperature must be 0 or more, got {args.temperature:g}"
    if args.top_k is not None and args.top_k < 1:
        return f"--top-k must be at least 1, got {args.top_k}"
    if args.top_p is not None and not 0 < args.top_p <= 1:
        return f"--top-p must be above 0 and at most 1, got {args.top_p:g}"
    if args.temperature == 0 and (args.top_k or args.top_p):
        return "--top-k and --top-p need sampling: give a --temperature above 0 as well"
    return _find_quant_conflict(args)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=MODEL)
    parser.add_argument(
        "--summary", action="store_true", help="print totals only, not each tensor"
    )


def _add_verify_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops",
        nargs="*",
        type=_make_check(OPS, "op with kernels"),
        metavar="OP",
        help=f"ops to check: {', '.join(OPS)}; default: all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the records to a JSON file, instead of your own data folder",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        required=True,
        help="text to continue; - to read it from stdin",
    )
    parser.add_argument(
        "--chat", action="store_true", help="answer the prompt as a message in a chat"
    )
    _add_model(parser, temperature=0.0)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    _add_model(parser, temperature=0.7)


def _add_model(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """Declares the arguments that select a model and control its output."""
    parser.add_argument("model", help=MODEL)
    load = parser.add_argument_group("options of the model")
    load.add_argument(
        "--quant",
        choices=(*FORMATS, STORED),
        metavar="FORMAT",
        help=f"quantise the linear layers to one of {', '.join(FORMATS)}; or "
        f"{STORED}: keep those of a GGUF file as they are, if a format holds them",
    )
    load.add_argument(
        "--double-quant", action="store_true", help="quantise the absmax to 8 bits"
    )
    load.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of everything else; default: the checkpoint's",
    )
    load.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder with tokenizer.json, or a GGUF file; default: the adapter's, or "
        "else the model's",
    )
    load.add_argument(
        "--adapter",
        metavar="PATH",
        help="a folder with LoRA adapters, written by jaxbnb or PEFT",
    )
    write = parser.add_argument_group("options of the text")
    write.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="largest number of tokens to generate; default: 256",
    )
    write.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="temperature of sampling; 0 always takes the likeliest token; default: "
        f"{temperature:g}",
    )
    write.add_argument(
        "--top-k", type=int, metavar="K", help="sample among the K likeliest tokens"
    )
    write.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens with a total probability of P",
    )
    write.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of sampling; default: 0"
    )
    write.add_argument(
        "--cache-dtype",
        choices=(*DTYPES, "int8"),
        help="dtype of the cached keys and values; default: that of the computation",
    )
    write.add_argument(
        "--stats",
        action="store_true",
        help="print the number of tokens and their speed to stderr",
    )


_ADD: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "bench": _add_bench,
    "calibrate": _add_calibrate,
    "chat": _add_chat,
    "convert": _add_convert,
    "finetune": add_finetune,
    "generate": _add_generate,
    "inspect": _add_inspect,
    "plan": add_plan,
    "verify-kernels": _add_verify_kernels,
}
# Functions that say how the arguments of a verb contradict each other; None if they do
# not.
_CONFLICTS: Final[dict[str, Callable[[argparse.Namespace], str | None]]] = {
    "bench": _find_bench_conflict,
    "calibrate": _find_calibrate_conflict,
    "chat": _find_text_conflict,
    "convert": _find_convert_conflict,
    "finetune": find_processes_conflict,
    "generate": _find_text_conflict,
    "plan": find_plan_conflict,
}
