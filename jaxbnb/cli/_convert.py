"""`jaxbnb convert`: rewrites a checkpoint, and quantises it if asked."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from jaxbnb.cli import _processes
from jaxbnb.cli._inspect import describe_loading
from jaxbnb.convert import (
    TensorReport,
    convert_checkpoint,
    plan_conversion,
    report_table,
)
from jaxbnb.convert.plan import LEFT_OUT
from jaxbnb.core import QuantConfig
from jaxbnb.core.processes import gather
from jaxbnb.models import (
    convert_to_flax,
    convert_to_gguf,
    plan_to_flax,
    plan_to_gguf,
)


def run(args: argparse.Namespace) -> int:
    """Converts, and prints a summary, or ``error: ...`` to stderr.

    Returns:
        The exit status: 0, or 1 if reading or writing failed.
    """
    start = time.perf_counter()
    progress = _make_progress() if sys.stderr.isatty() and not args.dry_run else None
    reports: list[TensorReport] = []
    try:
        quant = _make_quant(args)
        _processes.join(args)
        if args.dry_run:
            return _dry_run(args, quant)
        if args.to == "flax":
            written = convert_to_flax(
                args.src,
                args.dst,
                quant=quant,
                dtype=args.dtype,
                progress=progress,
                report=reports.append,
            )
            parts = gather("reporting the tensors", lambda: reports)
            reports = [report for part in parts for report in part]
            summary = f"{args.dst}: {len(reports)} tensors, {written / 1e6:,.1f} MB"
        elif args.to == "gguf":
            written = convert_to_gguf(
                args.src,
                args.dst,
                quant=args.quant,
                dtype=args.dtype,
                progress=progress,
                report=reports.append,
            )
            summary = f"{args.dst}: {len(reports)} tensors, {written / 1e6:,.1f} MB"
        else:
            checkpoint = convert_checkpoint(
                args.src,
                args.dst,
                dtype=args.dtype,
                quant=quant,
                to=_find_library(args),
                progress=progress,
                report=reports.append,
            )
            stored = checkpoint.stored or checkpoint
            count, megabytes = len(checkpoint.tensors), stored.nbytes / 1e6
            summary = f"{args.dst}: {count} tensors, {megabytes:,.1f} MB"
    except (
        *(ValueError, NotImplementedError, OSError, ImportError),
        *_processes.ERRORS,
    ) as error:
        if progress is not None:
            print(file=sys.stderr)
        _processes.report(error)
        return _processes.leave(1)
    if progress is not None:
        print(file=sys.stderr)
    if not _processes.is_first():
        return _processes.leave(0)
    if args.report:
        print(report_table(reports))
    _print_unquantized(reports)
    worst = min((r for r in reports if r.sqnr is not None), key=_get_sqnr, default=None)
    if worst is not None:
        summary += f", lowest SQNR {worst.sqnr:.2f} dB ({worst.name})"
    print(f"{summary}, {time.perf_counter() - start:.1f} s")
    return _processes.leave(0)


def _make_quant(args: argparse.Namespace) -> QuantConfig | None:
    """Returns the format of the linear layers."""
    if not args.quant or args.to == "gguf":
        return None
    # vLLM multiplies float8 by float8.
    has_float8_inputs = args.to == "compressed-tensors" and args.quant == "fp8_e4m3"
    return QuantConfig(
        args.quant,
        block_size=args.block_size,
        double_quant=args.double_quant,
        act_quant_type=args.quant if has_float8_inputs else None,
    )


def _find_library(args: argparse.Namespace) -> str:
    """Returns the library that stores quantised layers."""
    return args.to if args.to == "compressed-tensors" else "bitsandbytes"


def _print_unquantized(reports: Sequence[TensorReport]) -> None:
    """Prints which linear layers are unexpectedly not quantised, if there are any."""
    noted = [r for r in reports if r.note and r.result != LEFT_OUT]
    if not noted:
        return
    linear = len(noted) + sum(r.is_quantized for r in reports)
    nbytes = sum(r.nbytes for r in noted)
    notes = "; ".join(sorted({r.note for r in noted}))
    print(
        f"not quantised: {len(noted)} of {linear} linear layers, {nbytes / 1e6:,.1f} "
        f"MB, e.g. {noted[0].name} ({notes})"
    )


def _get_sqnr(report: TensorReport) -> float:
    return float("inf") if report.sqnr is None else report.sqnr


def _dry_run(args: argparse.Namespace, quant: QuantConfig | None) -> int:
    dtype = args.dtype
    if args.to == "flax":
        reports = plan_to_flax(args.src, dtype=dtype, quant=quant)
    elif args.to == "gguf":
        reports = plan_to_gguf(args.src, dtype=dtype, quant=args.quant)
    else:
        reports = plan_conversion(
            args.src, dtype=dtype, quant=quant, to=_find_library(args)
        )
    print(report_table(reports))
    _print_unquantized(reports)
    # plan_to_flax fails for a model that jaxbnb cannot load. The other plans do not, as
    # transformers may load it.
    print(describe_loading(args.src))
    return 0


def _make_progress() -> Callable[[int, int, str], None]:
    """Returns a callback that redraws a line of the terminal at each new percentage."""
    start, shown = time.perf_counter(), -1

    def show(done: int, total: int, name: str) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            left = (time.perf_counter() - start) * (total - done) / max(done, 1)
            line = f"{percent:3d}% of {total / 1e6:,.1f} MB, {left:.0f} s left  {name}"
            # \x1b[K clears the rest of a longer line.
            print(f"\r{line:.79}\x1b[K", end="", file=sys.stderr, flush=True)

    return show
