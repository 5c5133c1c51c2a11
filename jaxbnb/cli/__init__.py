"""The command line: ``jaxbnb <verb>``, also ``python -m jaxbnb <verb>``.

Each verb is a module next to this one. Its ``run(args) -> int`` returns the exit
status, and `_arguments` declares its arguments. A verb, and JAX with it, is imported
only after its arguments have been checked.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from jaxbnb.cli import _arguments
from jaxbnb.cli._huge_pages import restart_with_huge_pages

__all__ = ["main"]

# The verbs that take the same step many times.
_STEPPING = ("calibrate", "finetune")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: command-line arguments; None for the process's own.

    Returns:
        The exit status: 0, 1 if the verb failed, or 130 if Ctrl-C ended it.

    Raises:
        SystemExit: with status 2 for wrong usage, and with status 0 after ``--help``
            and ``--version``.
    """
    args = None
    try:
        args = _arguments.parse(sys.argv[1:] if argv is None else list(argv))
        if argv is None and args.verb in _STEPPING:
            restart_with_huge_pages()
        module = f"jaxbnb.cli._{args.verb.replace('-', '_')}"
        status = importlib.import_module(module).run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # The current line of a terminal shows ^C.
        message = "\ninterrupted" if sys.stderr.isatty() else "interrupted"
        if args and (args.verb == "calibrate" or _is_converting(args)):
            message += ": the same command continues from here"
        print(message, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, e.g. `head`, has closed the pipe. Redirecting to
        # /dev/null keeps Python from failing when it flushes the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _is_converting(args: argparse.Namespace) -> bool:
    return args.verb == "convert" and not args.dry_run
