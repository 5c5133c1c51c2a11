"""LoRA over quantised weights compared with LoRA over bfloat16 weights."""

import dataclasses
from collections.abc import Iterator

import jax

from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._parity import (
    FAMILIES,
    Bench,
    measure_distance,
    standard_error,
)
from jaxbnb.benchmarks._parity_tasks import Adapters
from jaxbnb.optim import adamw8bit

# The text, rank, steps and learning rate of `make demo`, with a quarter of its tokens.
# All of the held-out text, as the choice of fewer windows would decide the digits.
DEMO = Adapters("bfloat16", batch=2, length=128, held_out=146, evaluate_every=24)
# Those that decide most come first, and those of one method together. The largest loss
# in nats above that of the whole base, where there is a goal.
QUANTIZED = {
    "nf4, guided and tuned": 0.02,
    "nf4, guided": None,
    "nf4, guided and fitted": None,
    "nf4, kronecker and tuned": 0.02,
    "nf4, kronecker": None,
    "nf4": None,
    "nf4, fitted": None,
    "nf4, LoftQ": None,
}


def bench_adapters(setting: Adapters = DEMO) -> Iterator[Figure]:
    """Measures the held-out loss before and after training over each base.

    A figure is how far the loss over a quantised base is above that over the whole one,
    averaged over the seeds.

    Args:
        setting: setting of the runs; the others are compared with its base.

    Raises:
        ImportError: a required package is not installed.
    """
    adamw = FAMILIES[0]
    whole = Bench(setting).run(adamw, adamw8bit)
    for base, goal in QUANTIZED.items():
        # The next base cannot use the compiled programs of this one.
        jax.clear_caches()
        ours = Bench(dataclasses.replace(setting, base=base)).run(adamw, adamw8bit)
        distance = measure_distance(ours, whole, setting)
        before = [runs.held_out[:, 0].mean() for runs in (ours, whole)]
        windows = (ours.windows - whole.windows).mean(axis=0)
        yield Figure(
            f"LoRA over {base} beside {setting.base}",
            distance.nats,
            "nats",
            goal,
            f"{distance.detail}\n"
            f"    ± {standard_error(windows):.4f} by the choice of {len(windows)} "
            "held-out windows\n"
            f"    {distance.deviations:.1f} x the seeds' deviation; "
            f"before training: {before[0]:.4f} and {before[1]:.4f}",
            {
                "base": base,
                "setting": dataclasses.asdict(setting),
                "held_out": ours.held_out.round(5).tolist(),
                "held_out_beside": whole.held_out.round(5).tolist(),
                "windows": windows.round(5).tolist(),
            },
        )
