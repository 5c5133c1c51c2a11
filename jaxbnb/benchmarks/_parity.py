"""Training with low-bit state compared with Optax's float32 state."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxbnb import optim
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._parity_plot import plot_parity
from jaxbnb.benchmarks._parity_tasks import Adapters, FromScratch, Setting
from jaxbnb.benchmarks._plots import import_pyplot
from jaxbnb.finetune import compile_train_step, completion_log_probs, train_step

# Training losses of this many steps are averaged to a point of a curve.
TRAIN_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Family:
    """A 32-bit optimizer and its low-bit forms.

    Attributes:
        name: name of the 32-bit optimizer.
        make: function that makes the 32-bit optimizer from a learning rate and options.
        low_bit: low-bit optimizers by name, as functions of the same arguments.
        learning_rate: peak learning rate for all of them, by type of setting. From ...,
            1e-3, 3e-3, 1e-2, ... the best for the 32-bit optimizer with one seed.
        options: function that makes the options from the schedule and the number of
            steps.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    low_bit: Mapping[str, Callable[..., optax.GradientTransformation]]
    learning_rate: Mapping[type, float]
    options: Callable[[optax.Schedule, int], dict[str, Any]] = lambda rate, steps: {}


# Parity is claimed for eight bits, not for four.
WITHOUT_LIMIT = ("adamw4bit",)


def _make_rates(from_scratch: float, adapters: float) -> Mapping[type, float]:
    return {FromScratch: from_scratch, Adapters: adapters}


def _make_long_memory(rate: optax.Schedule, steps: int) -> dict[str, Any]:
    """Returns the schedules of AdEMAMix's paper, for a short run."""
    del rate
    b3 = optim.ademamix_b3_schedule(0.9, 0.999, steps)
    return {"b3": b3, "alpha": optax.linear_schedule(0.0, 5.0, steps)}


def _select_hidden_matrices(rate: optax.Schedule, steps: int) -> dict[str, Any]:
    """Returns options of Muon for stacked layers: it gets only their matrices.

    Adam gets the rest, with a tenth of the learning rate. By default,
    `optax.contrib.muon` would orthogonalise the embedding, the output head and the
    stacked scales of the norms, and leave the matrices to Adam.
    """
    del steps
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return {
        "muon_weight_dimension_numbers": lambda params: jax.tree.map(
            lambda x: matrix if x.ndim == 3 else None, params
        ),
        "adam_learning_rate": lambda count: 0.1 * rate(count),
    }


FAMILIES = (
    Family(
        "optax.adamw",
        optax.adamw,
        {
            "adamw8bit": optim.adamw8bit,
            "adamw4bit": optim.adamw4bit,
            "adamw_fp8": optim.adamw_fp8,
        },
        _make_rates(3e-3, 1e-3),
    ),
    Family(
        "optax.lion", optax.lion, {"lion8bit": optim.lion8bit}, _make_rates(1e-3, 1e-3)
    ),
    Family(
        "optax.sgd",
        optax.sgd,
        {"sgd8bit": optim.sgd8bit},
        _make_rates(0.1, 0.1),
        lambda rate, steps: {"momentum": 0.9},
    ),
    Family(
        "optax.rmsprop",
        optax.rmsprop,
        {"rmsprop8bit": optim.rmsprop8bit},
        _make_rates(3e-3, 1e-3),
    ),
    Family(
        "optax.adagrad",
        optax.adagrad,
        {"adagrad8bit": optim.adagrad8bit},
        _make_rates(3e-2, 3e-3),
        # The default of torch and bitsandbytes. Optax's default is 0.1, where squared
        # gradients of about 1e-6 would vanish, and Adagrad would be SGD.
        lambda rate, steps: {"initial_accumulator_value": 0.0},
    ),
    Family(
        "optax.lamb", optax.lamb, {"lamb8bit": optim.lamb8bit}, _make_rates(1e-2, 3e-2)
    ),
    Family(
        "optax.lars", optax.lars, {"lars8bit": optim.lars8bit}, _make_rates(3.0, 0.1)
    ),
    Family(
        "optax.contrib.ademamix",
        optax.contrib.ademamix,
        {"ademamix8bit": optim.ademamix8bit},
        _make_rates(1e-3, 1e-3),
        _make_long_memory,
    ),
    Family(
        "optax.contrib.muon",
        optax.contrib.muon,
        {"muon8bit": lambda rate, **options: optim.muon8bit(rate, muon=options)},
        _make_rates(3e-2, 1e-2),
        _select_hidden_matrices,
    ),
)

PARITY_OPTIMIZERS = tuple(name for family in FAMILIES for name in family.low_bit)


def bench_parity(
    only: Sequence[str] = (),
    plot: Path | None = None,
    adapters: bool = False,
    setting: Setting | None = None,
) -> Iterator[Figure]:
    """Measures the held-out loss of a model after training with each optimizer.

    A figure is the difference between an optimizer and its 32-bit twin, averaged over
    the seeds, in standard deviations of the twin's loss over the seeds.

    Args:
        only: names of low-bit optimizers to train with; all if empty.
        plot: file to draw the curves to, e.g. a PNG or SVG.
        adapters: whether to train adapters of SmolLM2-135M instead of a small model.
        setting: any other setting, instead of these two.

    Raises:
        ValueError: there is no such optimizer, or there are fewer than two seeds.
        ImportError: a required package is not installed.
    """
    names = PARITY_OPTIMIZERS
    if setting is None:
        setting = Adapters() if adapters else FromScratch()
    for name in only:
        if name not in names:
            raise ValueError(f"no optimizer {name!r}; choose from {', '.join(names)}")
    if setting.seeds < 2:
        raise ValueError(f"a deviation needs at least 2 seeds; got {setting.seeds}")
    if plot is not None:
        import_pyplot()
    return _measure(only or names, plot, Bench(setting))


def _measure(names, plot, bench: "Bench") -> Iterator[Figure]:
    setting = bench.setting
    figures = []
    for family in FAMILIES:
        chosen = [name for name in family.low_bit if name in names]
        if not chosen:
            continue
        twin = bench.run(family, family.make)
        for name in chosen:
            ours = bench.run(family, family.low_bit[name])
            figures.append(_compare(name, ours, family, twin, setting))
            yield figures[-1]
    if plot is not None:
        plot_parity(figures, plot)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Losses of all runs of one optimizer, in nats a token.

    Attributes:
        train: training losses, ``(seeds, steps)``.
        held_out: held-out losses, ``(seeds, evaluations)``.
        windows: held-out loss of each window in the end, ``(seeds, windows)``.
        seconds: time of all runs together.
    """

    train: np.ndarray
    held_out: np.ndarray
    windows: np.ndarray
    seconds: float

    def asdict(self) -> dict[str, Any]:
        groups = np.array_split(
            self.train, max(1, self.train.shape[1] // TRAIN_EVERY), axis=1
        )
        train = np.stack([group.mean(axis=1) for group in groups], axis=1)
        return {
            "train": train.round(4).tolist(),
            "held_out": self.held_out.round(5).tolist(),
            "seconds": round(self.seconds, 1),
        }


class Bench:
    """Trains with one optimizer after another."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.task = task = setting.load()
        needed = setting.steps * setting.batch
        if len(task.windows) < needed:
            raise ValueError(
                f"{setting.steps} steps need {needed} windows of text, but there are "
                f"only {len(task.windows)}"
            )

        def evaluate(params, rest):
            model = nnx.merge(task.graphdef, params, rest)
            every = jnp.ones(task.held_out.shape, bool)
            # A window's first token has no prediction.
            targets = setting.length - 1
            return -completion_log_probs(model, task.held_out, every) / targets

        self.evaluate = jax.jit(evaluate)

    def optimizer(self, family: Family, make) -> optax.GradientTransformation:
        steps, peak = self.setting.steps, family.learning_rate[type(self.setting)]
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, peak, steps // 10, steps, 0.1 * peak
        )
        return make(schedule, **family.options(schedule, steps))

    def run(self, family: Family, make) -> Runs:
        """Runs all seeds of an optimizer, compiled once; compilation is not timed."""
        setting, task = self.setting, self.task
        tx = self.optimizer(family, make)
        init = jax.jit(tx.init)
        compiled = compile_train_step(
            train_step(task.graphdef, tx, remat=False),
            task.shapes,
            jax.eval_shape(init, task.shapes),
            task.rest,
            (setting.batch, setting.length),
        )
        runs = []
        for seed in range(setting.seeds):
            params = task.initial(seed)
            runs.append(self._run(compiled, params, init(params), seed))
        train, held_out, seconds = zip(*runs, strict=True)
        windows = np.array(held_out)
        return Runs(
            np.array(train), windows.mean(axis=-1), windows[:, -1], sum(seconds)
        )

    def _run(self, compiled, params, state, seed: int):
        setting, rest = self.setting, self.task.rest
        order = np.random.default_rng(seed).permutation(len(self.task.windows))
        batches = self.task.windows[order[: setting.steps * setting.batch]]
        batches = batches.reshape(setting.steps, setting.batch, setting.length)
        train, held_out, seconds = [], [np.asarray(self.evaluate(params, rest))], 0.0
        for first in range(0, setting.steps, setting.evaluate_every):
            start = time.perf_counter()
            losses = []
            for batch in batches[first : first + setting.evaluate_every]:
                params, state, loss = compiled(params, state, rest, batch)
                losses.append(loss)
            train += [float(loss) for loss in losses]
            seconds += time.perf_counter() - start
            held_out.append(np.asarray(self.evaluate(params, rest)))
        return train, held_out, seconds


class Distance(NamedTuple):
    """How far apart two final losses are, averaged over the seeds.

    Attributes:
        nats: difference. A run that diverged is infinitely far away.
        deviations: its magnitude in standard deviations of the twin's loss over the
            seeds.
        detail: both losses and their times.
    """

    nats: float
    deviations: float
    detail: str


def measure_distance(ours: Runs, twin: Runs, setting: Setting) -> Distance:
    """Compares the final losses of two optimizers, or of two bases."""
    loss, twin_loss = ours.held_out[:, -1], twin.held_out[:, -1]
    std = float(np.std(twin_loss, ddof=1))
    difference = float(np.mean(loss - twin_loss))
    error = standard_error(loss - twin_loss)
    if not math.isfinite(difference):
        difference = math.inf
    deviations = abs(difference) / std if std else math.inf
    tokens = setting.steps * setting.batch * setting.length
    detail = (
        f"{np.mean(loss):.4f} against {np.mean(twin_loss):.4f} ± {std:.4f} nats a "
        f"{setting.unit}: {difference:+.4f} ± {error:.4f}\n"
        f"    {setting.seeds} seeds, each {tokens:,} {setting.unit}s in "
        f"{setting.steps} steps, "
        f"{ours.seconds / setting.seeds:.1f} s and {twin.seconds / setting.seeds:.1f} s"
    )
    return Distance(difference, deviations, detail)


def _compare(name, ours: Runs, family, twin: Runs, setting: Setting) -> Figure:
    distance = measure_distance(ours, twin, setting)
    evaluations = range(0, setting.steps, setting.evaluate_every)
    data = {
        "optimizer": name,
        "twin": family.name,
        "learning_rate": family.learning_rate[type(setting)],
        "title": setting.title,
        "unit": setting.unit,
        "setting": dataclasses.asdict(setting),
        "held_out_after": [*evaluations, setting.steps],
        "optimizer_loss": ours.asdict(),
        "twin_loss": twin.asdict(),
    }
    return Figure(
        f"{name} beside {family.name}",
        distance.deviations,
        "x the seeds' deviation",
        None if name in WITHOUT_LIMIT else 1.0,
        distance.detail,
        data,
    )


def standard_error(x: np.ndarray) -> float:
    return float(np.std(x, ddof=1) / math.sqrt(len(x)))
