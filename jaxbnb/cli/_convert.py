"""`jaxbnb convert`: a checkpoint to a Hugging Face folder."""

import argparse
import sys
import time
from collections.abc import Callable

from jaxbnb.convert import CheckpointError, convert_checkpoint

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``jaxbnb convert SRC DST [--dtype DTYPE]``."""
    parser.add_argument("src", help="a Hugging Face folder, or a GGUF file of a Llama")
    parser.add_argument("dst", help="the Hugging Face folder to write")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the floating tensors; by default each keeps its own, and what a GGUF "
        "file has quantised becomes float32",
    )


def run(args: argparse.Namespace) -> int:
    """Converts; prints a summary, or ``error: ...`` to stderr.

    Returns:
        The exit status: 0, or 1 where the source cannot be read or the folder written.
    """
    start = time.perf_counter()
    progress = _progress_line() if sys.stderr.isatty() else None
    try:
        checkpoint = convert_checkpoint(
            args.src, args.dst, dtype=args.dtype, progress=progress
        )
    except (CheckpointError, OSError, ImportError) as error:
        if progress is not None:
            print(file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 1
    if progress is not None:
        print(file=sys.stderr)
    print(
        f"{args.dst}: {len(checkpoint.tensors)} tensors, "
        f"{checkpoint.nbytes / 1e6:,.1f} MB, {time.perf_counter() - start:.1f} s"
    )
    return 0


def _progress_line() -> Callable[[int, int, str], None]:
    """Redraws one line of the terminal, when its percentage changes."""
    shown = -1

    def show(done: int, total: int, name: str) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            line = f"{percent:3d}% of {total / 1e6:,.1f} MB  {name}"
            # \x1b[K clears what a longer name has left.
            print(f"\r{line:.79}\x1b[K", end="", file=sys.stderr, flush=True)

    return show
