"""`jaxbnb bench`: measure, print, and write to a file."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

NAMES = (
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(NAMES)}; all by default",
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


def _optimizers(text: str) -> list[str]:
    from jaxbnb.benchmarks import PARITY_OPTIMIZERS

    names = text.split(",")
    for name in names:
        if name not in PARITY_OPTIMIZERS:
            choices = ", ".join(PARITY_OPTIMIZERS)
            raise argparse.ArgumentTypeError(f"no {name!r}; choose of {choices}")
    return names


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks; 1 when a figure misses its limit."""
    unknown = [name for name in args.benchmarks if name not in NAMES]
    if unknown:
        print(
            f"error: no benchmark {unknown[0]!r}; choose of {', '.join(NAMES)}",
            file=sys.stderr,
        )
        return 2
    names = args.benchmarks or NAMES
    options = {"only": args.only, "plot": args.plot, "adapters": args.adapters}
    options = {k: v for k, v in options.items() if v}
    if options and "parity" not in names:
        flags = " and ".join(f"--{name}" for name in options)
        print(f"error: {flags}: only of the benchmark parity", file=sys.stderr)
        return 2
    from jaxbnb.benchmarks import BENCHMARKS, machine
    from jaxbnb.core._files import atomic_write

    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = {}
    missed = 0
    for name in names:
        print(f"\n{name}")
        results[name] = []
        try:
            given = options if name == "parity" else {}
            for figure in BENCHMARKS[name](**given):
                results[name].append(dataclasses.asdict(figure))
                missed += _print(figure)
        except (ImportError, NotImplementedError) as error:
            print(f"  skipped: {error}")
    if args.out is not None:
        with atomic_write(args.out) as path:
            path.write_text(
                json.dumps({"machine": about, "figures": results}, indent=2) + "\n"
            )
    return 1 if missed else 0


def _print(figure) -> bool:
    missed = figure.limit is not None and figure.value > figure.limit
    limit = ""
    if figure.limit is not None:
        limit = f"{'MISSED' if missed else 'ok'}: at most {figure.limit:g}"
    print(f"  {figure.name:42} {figure.value:9.3f} {figure.unit}  {limit}", flush=True)
    if figure.detail:
        print(f"    {figure.detail}", flush=True)
    return missed
