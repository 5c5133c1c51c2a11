"""``jaxbnb <verb>``, which is ``python -m jaxbnb <verb>``.

A verb is a module beside this one, with ``add_arguments(parser)`` and
``run(args) -> int``, the exit status. Only the one that is asked for is imported.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_VERBS = {
    "bench": "measure speed, memory and perplexity, beside other libraries",
    "chat": "talk with a model",
    "convert": "rewrite a checkpoint, quantised or not",
    "env": "print versions, devices and implementations, and check the numbers",
    "generate": "continue a prompt",
    "inspect": "print what a checkpoint holds, and whether it loads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status: 0, or 1 where the verb failed, or 130 where Ctrl-C ended it; a
        wrong usage exits with 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="jaxbnb", description="bitsandbytes for JAX: tools for the command line."
    )
    version = f"jaxbnb {importlib.metadata.version('jaxbnb')}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="<verb>", required=True)
    for verb, summary in _VERBS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = verbs.add_parser(verb, help=summary, description=description)
        if verb in argv:
            module = importlib.import_module(f"jaxbnb.cli._{verb}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # What was printed so far stands; the shell's prompt goes on a line of its own.
        print(flush=True)
        return 130
    except BrokenPipeError:
        # Who reads what we print, such as `head`, has enough of it. Python would flush
        # the rest once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
