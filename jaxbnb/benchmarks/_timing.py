"""Times taken side by side, because the machines they are taken on are shared."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def time_together(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int = 15
) -> dict[str, list[float]]:
    """Runs the functions in turn, ``rounds`` times, after one round that is not timed.

    Args:
        functions: name -> function; what it returns is waited for.
        rounds: how often each is timed.

    Returns:
        Seconds of each round, by name. Compare within a round: what else the machine
        does then slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of one time over the other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def milliseconds(times: list[float]) -> str:
    """The median, to read."""
    return f"{1e3 * statistics.median(times):.1f} ms"
