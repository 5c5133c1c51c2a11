"""`jaxbnb bench`: measures, prints the figures, and writes them to a file."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxbnb.benchmarks import BENCHMARKS, Figure, machine
from jaxbnb.cli._choices import BENCHMARK_OPTIONS, PLOTTED
from jaxbnb.core.files import atomic_write


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks.

    Returns:
        The exit status: 0, or 1 if a figure is above its limit.
    """
    # Benchmarks start processes, which need memory of the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results: dict[str, list[Figure]] = {}
    for name in args.benchmarks or BENCHMARKS:
        print(f"\n{name}")
        results[name] = []
        try:
            for figure in BENCHMARKS[name](**_options(name, args)):
                results[name].append(figure)
                _print(figure)
                if args.out is not None:
                    # A run that is stopped keeps what it has measured.
                    _write(args.out, about, results)
        except (ImportError, NotImplementedError) as error:
            print(f"  skipped: {error}")
    if args.out is not None:
        _write(args.out, about, results)
    figures = [figure for found in results.values() for figure in found]
    if "kernels" in results:
        _print_table(results["kernels"])
    return 1 if any(map(_is_missed, figures)) else 0


def _options(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    names = [*BENCHMARK_OPTIONS.get(benchmark, ())]
    if benchmark in PLOTTED:
        names.append("plot")
    return {name: value for name in names if (value := vars(args)[name])}


def _write(out: Path, about: dict[str, str], results: dict[str, list[Figure]]) -> None:
    figures = {n: [*map(dataclasses.asdict, found)] for n, found in results.items()}
    with atomic_write(out) as path:
        path.write_text(
            json.dumps({"machine": about, "figures": figures}, indent=2) + "\n"
        )


def _print_table(figures: Iterable[Figure]) -> None:
    """Prints measured values next to their targets, the largest allowed."""
    rows = [figure for figure in figures if figure.limit is not None]
    if not rows:
        return
    names = [f"{figure.name}, {figure.unit}" for figure in rows]
    width = max(map(len, names))
    print(f"\n{'':{width}}  measured  target")
    for name, figure in zip(names, rows, strict=True):
        outcome = "MISSED" if _is_missed(figure) else "ok"
        print(f"{name:{width}}{figure.value:10.3f}{figure.limit:8.3f}  {outcome}")


def _is_missed(figure: Figure) -> bool:
    return figure.limit is not None and not figure.value <= figure.limit


def _print(figure: Figure) -> None:
    limit = ""
    if figure.limit is not None:
        limit = f"{'MISSED' if _is_missed(figure) else 'ok'}: at most {figure.limit:g}"
    print(f"  {figure.name:42} {figure.value:9.3f} {figure.unit}  {limit}", flush=True)
    if figure.detail:
        print(f"    {figure.detail}", flush=True)
