"""`jaxbnb bench`: measure, print, and write to a file."""

import argparse
import dataclasses
import json

from jaxbnb.benchmarks import BENCHMARKS, machine
from jaxbnb.core.files import atomic_write


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks; 1 when a figure misses its limit."""
    options = {"only": args.only, "plot": args.plot, "adapters": args.adapters}
    options = {k: v for k, v in options.items() if v}
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = {}
    missed = 0
    for name in args.benchmarks or BENCHMARKS:
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
