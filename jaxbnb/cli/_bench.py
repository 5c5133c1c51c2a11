"""`jaxbnb bench`: measure, print, and write to a file."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

NAMES = ("quantize", "optim", "layers", "perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(NAMES)}; all by default",
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks; 1 when a figure misses its limit."""
    unknown = [name for name in args.benchmarks if name not in NAMES]
    if unknown:
        print(
            f"error: no benchmark {unknown[0]!r}; choose of {', '.join(NAMES)}",
            file=sys.stderr,
        )
        return 2
    from jaxbnb.benchmarks import BENCHMARKS, machine
    from jaxbnb.core._files import atomic_write

    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = {}
    missed = 0
    for name in args.benchmarks or NAMES:
        print(f"\n{name}")
        results[name] = []
        try:
            for figure in BENCHMARKS[name]():
                results[name].append(dataclasses.asdict(figure))
                missed += _print(figure)
        except ModuleNotFoundError as error:
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
