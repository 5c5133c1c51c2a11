"""`jaxbnb bench`: measures, prints the figures, and writes them to a file."""

import argparse
import dataclasses
import json

from jaxbnb.benchmarks import BENCHMARKS, Figure, machine
from jaxbnb.core.files import atomic_write


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks.

    Returns:
        The exit status: 0, or 1 if a figure is above its limit.
    """
    parity = {"only": args.only, "plot": args.plot, "adapters": args.adapters}
    options = {"parity": parity, "scaling": {"plot": args.plot}}
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = {}
    num_missed = 0
    for name in args.benchmarks or BENCHMARKS:
        print(f"\n{name}")
        results[name] = []
        try:
            given = {k: v for k, v in options.get(name, {}).items() if v}
            for figure in BENCHMARKS[name](**given):
                results[name].append(dataclasses.asdict(figure))
                _print(figure)
                num_missed += _is_missed(figure)
        except (ImportError, NotImplementedError) as error:
            print(f"  skipped: {error}")
    if args.out is not None:
        with atomic_write(args.out) as path:
            path.write_text(
                json.dumps({"machine": about, "figures": results}, indent=2) + "\n"
            )
    return 1 if num_missed else 0


def _is_missed(figure: Figure) -> bool:
    return figure.limit is not None and figure.value > figure.limit


def _print(figure: Figure) -> None:
    limit = ""
    if figure.limit is not None:
        limit = f"{'MISSED' if _is_missed(figure) else 'ok'}: at most {figure.limit:g}"
    print(f"  {figure.name:42} {figure.value:9.3f} {figure.unit}  {limit}", flush=True)
    if figure.detail:
        print(f"    {figure.detail}", flush=True)
