"""LoRA over quantised weights beside the same over bfloat16 ones."""

import dataclasses
from collections.abc import Iterator

import jax

from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._parity import FAMILIES, Bench, closeness
from jaxbnb.benchmarks._parity_tasks import Adapters
from jaxbnb.optim import adamw8bit

# The demo's text, rank, steps and learning rate; a quarter of its tokens.
DEMO = Adapters("bfloat16", batch=2, length=128, held_out=24, evaluate_every=24)
QUANTISED = ("nf4", "nf4, LoftQ")


def bench_adapters(setting: Adapters = DEMO) -> Iterator[Figure]:
    """The held-out loss before and after training, over each base.

    A figure is the mean difference between a quantised base and the whole one over the
    seeds, in standard deviations of the latter over the seeds.

    Args:
        setting: of the run; its base is what the others are compared with.

    Raises:
        ImportError: a package is missing that this needs.
    """
    adamw = FAMILIES[0]
    whole = Bench(setting).run(adamw, adamw8bit)
    for base in QUANTISED:
        # The programs of one base are of no use to the next.
        jax.clear_caches()
        ours = Bench(dataclasses.replace(setting, base=base)).run(adamw, adamw8bit)
        value, detail = closeness(ours, whole, setting)
        before = [runs.held_out[:, 0].mean() for runs in (ours, whole)]
        yield Figure(
            f"LoRA over {base} beside {setting.base}",
            value,
            "x the seeds' deviation",
            None,
            f"{detail}\n    before: {before[0]:.4f} and {before[1]:.4f}",
            {
                "base": base,
                "setting": dataclasses.asdict(setting),
                "held_out": ours.held_out.round(5).tolist(),
                "held_out_beside": whole.held_out.round(5).tolist(),
            },
        )
