"""`jaxbnb verify-kernels`: checks the GPU kernels, so that they run by themselves."""

import argparse
import sys

from jaxbnb_kernels import verification


def run(args: argparse.Namespace) -> int:
    """Checks the kernels of each op, and prints the verdicts.

    Returns:
        The exit status: 0, or 1 if a kernel failed or none could be checked.
    """
    try:
        verdicts = verification.verify(
            args.ops or None, report=print_verdict, out=args.out
        )
    except (NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = [op for op, verdict in verdicts.items() if verdict.reason is not None]
    if failed:
        print(f"XLA's code runs instead of the kernels of {', '.join(failed)}")
        return 1
    print("these kernels now run by themselves on this GPU")
    return 0


def print_verdict(kind: str, op: str, verdict: verification.Verdict) -> None:
    """Prints the outcome of an op's checks as one line."""
    outcome = "ok" if verdict.reason is None else f"FAILED: {verdict.reason}"
    print(f"{kind}  {op:<19} {outcome}", flush=True)
