"""The arguments of each verb. Needs no JAX, so a wrong argument is answered at once."""

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

VERBS: Final = {
    "bench": "measure speed, memory and perplexity, next to other libraries",
    "chat": "talk with a model",
    "convert": "rewrite a checkpoint, quantised or not",
    "env": "print versions, devices and implementations, and check the numbers",
    "generate": "continue a prompt",
    "inspect": "print what a checkpoint holds, and whether it loads",
}
# Copies of names in packages that import JAX. A test compares them.
BENCHMARKS: Final = (
    "quantize",
    "optim",
    "layers",
    "kernels",
    "generate",
    "perplexity",
    "convert",
    "parity",
    "adapters",
)
OPTIMIZERS: Final = (
    "adamw8bit",
    "adamw4bit",
    "adamw_fp8",
    "lion8bit",
    "sgd8bit",
    "rmsprop8bit",
    "adagrad8bit",
    "lamb8bit",
    "lars8bit",
    "ademamix8bit",
    "muon8bit",
)
FORMATS: Final = (
    "nf4",
    "fp4",
    "int4",
    "int8",
    "llm_int8",
    "dynamic8",
    "dynamic8_unsigned",
    "fp8_e4m3",
    "fp8_e5m2",
)
_DTYPES = ("float32", "bfloat16", "float16")
_OUTPUTS = ("safetensors", "bitsandbytes", "flax")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of a verb, and its name as ``verb``.

    Raises:
        SystemExit: status 0 after ``--help`` and ``--version``; status 2, after a
            message, for arguments that are wrong or do not go together.
    """
    parser = argparse.ArgumentParser(
        prog="jaxbnb", description="bitsandbytes for JAX: tools for the command line."
    )
    version = f"jaxbnb {importlib.metadata.version('jaxbnb')}"
    parser.add_argument("--version", action="version", version=version)
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


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmarks",
        nargs="*",
        type=_one_of(BENCHMARKS, "benchmark"),
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)}; all by default",
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON")
    parity = parser.add_argument_group("parity")
    parity.add_argument(
        "--only",
        type=_optimizers,
        metavar="OPTIMIZERS",
        help="train with these, e.g. adamw8bit,lion8bit; all by default",
    )
    parity.add_argument(
        "--adapters",
        action="store_true",
        help="train adapters of SmolLM2-135M in NF4, not a small model from scratch",
    )
    parity.add_argument("--plot", type=Path, help="draw the curves to this PNG or SVG")


def _one_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    # `choices` would refuse the empty list, which stands for all.
    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(
                f"no {what} {name!r}; choose from {', '.join(names)}"
            )
        return name

    return check


def _optimizers(text: str) -> list[str]:
    return list(map(_one_of(OPTIMIZERS, "optimizer"), text.split(",")))


def _bench_conflict(args: argparse.Namespace) -> str | None:
    flags = [f"--{name}" for name in ("only", "plot", "adapters") if vars(args)[name]]
    if flags and args.benchmarks and "parity" not in args.benchmarks:
        return f"{' and '.join(flags)}: only for the benchmark parity"
    return None


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src",
        help="a Hugging Face folder (safetensors or pytorch_model.bin), one file of "
        "safetensors, or a GGUF file",
    )
    parser.add_argument("dst", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the floating tensors; by default each keeps its own, and what a "
        "GGUF file has quantised becomes float32; decodes what bitsandbytes quantised",
    )
    parser.add_argument(
        "--quant",
        choices=FORMATS,
        metavar="FORMAT",
        help="format of the linear layers: nf4, fp4 or llm_int8, and with --to flax "
        "any other",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="quantise the absmax too"
    )
    parser.add_argument(
        "--to",
        choices=_OUTPUTS,
        help="safetensors, or bitsandbytes if there is a --quant: a folder that "
        "transformers loads; flax: a model's NNX state as Orbax writes it, which "
        "load_pretrained restores",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be done with each tensor, and whether the result loads; "
        "write nothing",
    )
    parser.add_argument(
        "--report", action="store_true", help="print a line for each tensor, with SQNR"
    )


def _convert_conflict(args: argparse.Namespace) -> str | None:
    if args.quant and args.to == "safetensors":
        return "--quant writes bitsandbytes' tensors: --to bitsandbytes"
    if args.to == "bitsandbytes" and not args.quant:
        return "--to bitsandbytes needs a --quant"
    return _quant_conflict(args)


def _quant_conflict(args: argparse.Namespace) -> str | None:
    if args.double_quant and not args.quant:
        return "--double-quant is an option of a format: give --quant as well"
    if args.double_quant and args.quant == "llm_int8":
        return "llm_int8 has one absmax for a whole row: leave out --double-quant"
    return None


def _text_conflict(args: argparse.Namespace) -> str | None:
    if args.max_new_tokens < 1:
        return f"--max-new-tokens must be at least 1, got {args.max_new_tokens}"
    if not args.temperature >= 0:
        return f"--temperature must be 0 or more, got {args.temperature:g}"
    if args.top_k is not None and args.top_k < 1:
        return f"--top-k must be at least 1, got {args.top_k}"
    if args.top_p is not None and not 0 < args.top_p <= 1:
        return f"--top-p must be above 0 and at most 1, got {args.top_p:g}"
    if args.temperature == 0 and (args.top_k or args.top_p):
        return "--top-k and --top-p sample: give a --temperature above 0 as well"
    return _quant_conflict(args)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a Hugging Face folder, or a file of weights")
    parser.add_argument(
        "--summary", action="store_true", help="leave out the line for each tensor"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        required=True,
        help="text to continue; - reads it from stdin",
    )
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message to answer"
    )
    _add_model(parser, temperature=0.0)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", help="a message before the first, from the system")
    _add_model(parser, temperature=0.7)


def _add_model(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """Declares the arguments for the model, and for how it writes."""
    parser.add_argument("model", help="a Hugging Face folder, or a GGUF file")
    load = parser.add_argument_group("the model")
    load.add_argument(
        "--quant",
        choices=FORMATS,
        metavar="FORMAT",
        help="quantise the linear layers, e.g. to nf4",
    )
    load.add_argument(
        "--double-quant", action="store_true", help="quantise their absmax to 8 bits"
    )
    load.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the rest; by default the checkpoint's own",
    )
    load.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder with tokenizer.json, or a GGUF file; by default the model's own",
    )
    load.add_argument("--adapter", help="a folder of LoRA adapters, ours or PEFT's")
    write = parser.add_argument_group("the text")
    write.add_argument(
        "--max-new-tokens", type=int, default=256, help="most to write (default: 256)"
    )
    write.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token (default: {temperature:g})",
    )
    write.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    write.add_argument(
        "--top-p",
        type=float,
        help="sample among the fewest tokens with this probability together",
    )
    write.add_argument(
        "--seed", type=int, default=0, help="seed for sampling (default: 0)"
    )
    write.add_argument(
        "--cache-dtype",
        choices=(*_DTYPES, "int8"),
        help="dtype of the keys and values kept; by default that of the computation",
    )
    write.add_argument(
        "--stats", action="store_true", help="print tokens and seconds to stderr"
    )


_ADD: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "bench": _add_bench,
    "chat": _add_chat,
    "convert": _add_convert,
    "generate": _add_generate,
    "inspect": _add_inspect,
}
# Why the arguments of a verb do not go together; None if they do.
_CONFLICTS: Final[dict[str, Callable[[argparse.Namespace], str | None]]] = {
    "bench": _bench_conflict,
    "chat": _text_conflict,
    "convert": _convert_conflict,
    "generate": _text_conflict,
}
