"""``jaxbnb <verb>``, which is ``python -m jaxbnb <verb>``.

Each verb is a module next to this one, with ``run(args) -> int``, the exit status.
`_arguments` declares its arguments. A verb, and JAX with it, is imported only once its
arguments are known to be right.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status: 0, 1 if the verb failed, or 130 if Ctrl-C ended it.

    Raises:
        SystemExit: status 2 for wrong usage; status 0 after ``--help`` and
            ``--version``.
    """
    args = None
    try:
        import importlib

        from jaxbnb.cli import _arguments

        args = _arguments.parse(sys.argv[1:] if argv is None else list(argv))
        status = importlib.import_module(f"jaxbnb.cli._{args.verb}").run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # A terminal shows ^C in the current line.
        message = "\ninterrupted" if sys.stderr.isatty() else "interrupted"
        if args and args.verb == "convert" and not args.dry_run:
            message += ": the same command goes on from here"
        print(message, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads what we print, such as `head`, has enough of it. Python would flush
        # the rest once more as it exits.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
