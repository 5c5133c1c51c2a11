"""Times measured side by side, because benchmark machines are often shared."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def time_together(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    settle: float = 0.05,
) -> dict[str, list[float]]:
    """Runs the functions in turn for ``rounds`` rounds.

    Before each timed call the same function runs a while. Otherwise its time would
    depend on which other one ran before: on what that left in the caches, and on its
    threads. OpenMP's keep a core busy for some milliseconds.

    Args:
        functions: functions by name; each call waits for the arrays that it returns.
        rounds: number of timed rounds.
        settle: seconds that a function runs before its timed call, and at least once.

    Returns:
        Seconds of each round, by name. Compare within a round, because other load on
        the machine slows all functions in it.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            while True:
                jax.block_until_ready(function())
                start = time.perf_counter()
                if start - begin > settle:
                    break
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median, over the rounds, of one time divided by the other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def milliseconds(times: list[float]) -> str:
    """Formats the median."""
    return f"{1e3 * statistics.median(times):.1f} ms"
