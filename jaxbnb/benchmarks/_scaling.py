"""How native CPU kernels scale: with threads, parameters and rows.

Each number of threads is measured in a process of its own that may use so many cores,
because XLA and torch make their threads when they start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._plots import import_pyplot
from jaxbnb.benchmarks._scaling_plot import plot_scaling

PARAMETERS: Final = (2**20, 2**22, 2**24, 2**26, 2**28)
ROWS: Final = (1, 4, 16, 64, 256, 1024, 4096)
SIZE: Final = 4096
# Bytes of a parameter that a step of adamw8bit reads or writes: float32 parameter,
# gradient and updated parameter, and two codes, read and written. Absmax are 1/64.
STEP_BYTES: Final = 3 * 4 + 2 * 2
# bitsandbytes takes many seconds for larger steps.
MOST_OF_PEER: Final = 2**24
PRODUCT, STEP = "NF4 product", "adamw8bit step"


def bench_scaling(
    plot: Path | None = None,
    *,
    parameters: Sequence[int] = PARAMETERS,
    rows: Sequence[int] = ROWS,
    size: int = SIZE,
    rounds: int = 2,
) -> Iterator[Figure]:
    """Measures a step and a product at several sizes, with one thread and with all.

    Args:
        plot: path of a plot of the times; None for none.
        parameters: sizes of the step.
        rows: rows of the product's input.
        size: rows and columns of the product's matrix.
        rounds: timed rounds of each measurement.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError("threads can be limited only on Linux")
    if plot is not None:
        import_pyplot()  # Raises an error now rather than after the measurements.
    runs = []
    setting = {"parameters": parameters, "rows": rows, "size": size, "rounds": rounds}
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({1, cores}):
        for measured in _run_with(threads, setting):
            runs.append(measured | {"threads": threads})
            yield _make_figure(runs[-1])
    if plot is not None:
        steps = [run for run in runs if run["what"] == STEP]
        plot_scaling(steps, [run for run in runs if run["what"] == PRODUCT], plot)


def _run_with(threads: int, setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs `measure` in a process of a few cores, and yields its lines as they come."""
    code = "from jaxbnb.benchmarks import _scaling; _scaling.measure()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(threads), json.dumps(setting)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        yield from map(json.loads, child.stdout)
    if child.returncode:
        raise RuntimeError(f"the measurement with {threads} threads failed, see above")


def _make_figure(run: dict[str, Any]) -> Figure:
    times = run["seconds"]
    against, unit = "dense", "rows"
    if run["what"] == STEP:
        against, unit = "optax", "parameters"
    return Figure(
        f"{run['what']}, {run['count']:,} {unit}, threads: {run['threads']}",
        times["jaxbnb"] / times[against],
        f"x {against}'s time",
        None,
        ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in times.items()),
        run,
    )


def measure() -> None:
    """Measures in this process, and prints a JSON object a line."""
    threads, setting = int(sys.argv[1]), json.loads(sys.argv[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    from jaxbnb.benchmarks._figure import is_installed
    from jaxbnb.benchmarks._timing import time_together

    has_peer = is_installed("torch", "bitsandbytes")
    if has_peer:
        import torch

        torch.set_num_threads(threads)

    def report(what: str, count: int, functions: dict[str, Callable]) -> None:
        times = time_together(functions, rounds=setting["rounds"])
        # Medians, as two sides of a ratio ran in turn.
        seconds = {name: median(values) for name, values in times.items()}
        line = {"what": what, "count": count, "seconds": seconds}
        print(json.dumps(line), flush=True)

    for count in setting["rows"]:
        functions = _make_products(count, setting["size"], has_peer)
        report(PRODUCT, count, functions)
    for count in setting["parameters"]:
        functions = _make_steps(count, has_peer, threads)
        report(STEP, count, functions)


def _make_products(
    rows: int, size: int, has_peer: bool
) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxbnb.benchmarks._product import make_bitsandbytes
    from jaxbnb.core import QuantConfig, matmul

    random = np.random.default_rng(0)
    weight = random.standard_normal((size, size), np.float32) / size**0.5
    x = random.standard_normal((rows, size), np.float32)
    q = QuantConfig("nf4").quantize_kernel(jnp.asarray(weight.T))
    kernel, inputs = jnp.asarray(weight.T), jnp.asarray(x)
    halves = inputs.astype(jnp.bfloat16)
    ours, dense = jax.jit(matmul), jax.jit(jnp.matmul)
    functions: dict[str, Callable[[], Any]] = {
        "jaxbnb": lambda: ours(halves, q),
        "jaxbnb, float32": lambda: ours(inputs, q),
        "dense": lambda: dense(inputs, kernel),
    }
    if has_peer:
        functions["bitsandbytes"] = make_bitsandbytes(
            weight, x, "nf4", "bfloat16", "inference"
        )
    return functions


def _make_steps(
    count: int, has_peer: bool, threads: int
) -> dict[str, Callable[[], Any]]:
    import optax

    from jaxbnb import optim
    from jaxbnb.benchmarks._optim import (
        make_bitsandbytes,
        make_stepper,
        update_and_apply,
    )

    shape = (count,)
    functions: dict[str, Callable[[], Any]] = {
        # As many bytes as the step moves: half of them read, half of them written.
        "copy": _make_copy(STEP_BYTES * count // 2, threads),
        "jaxbnb": make_stepper(optim.adamw8bit(1e-3), optim.fused_step, shape),
        "optax": make_stepper(optax.adamw(1e-3), update_and_apply, shape),
    }
    if has_peer and count <= MOST_OF_PEER:
        functions["bitsandbytes"] = make_bitsandbytes("AdamW8bit", shape)
    return functions


def _make_copy(num_bytes: int, threads: int) -> Callable[[], None]:
    """Returns a function that copies memory which it has touched before."""
    import numpy as np

    source, target = np.ones((2, num_bytes), np.uint8)
    parts = [np.array_split(array, threads) for array in (target, source)]
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        list(pool.map(np.copyto, *parts))

    return copy
