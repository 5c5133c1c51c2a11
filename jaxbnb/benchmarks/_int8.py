"""LLM.int8 compared with bitsandbytes' Linear8bitLt on the same CPU."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._figure import Figure, is_installed
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.core import matmul, quantize

SIZE, ROWS, THRESHOLD = 4096, 512, 6.0
# The paper finds 8 outlier columns of 4096 in large models; 512 are far more. These
# cases use float32, because on some machines torch's bfloat16 product is an illegal
# instruction.
CASES = (("bfloat16", 0), ("float32", 0), ("float32", 8), ("float32", 512))


def bench_int8() -> Iterator[Figure]:
    """Measures the product of 512 rows and a 4096 x 4096 matrix in several cases."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((SIZE, SIZE), np.float32) / SIZE**0.5
    kernel = quantize(jnp.asarray(weight.T), "llm_int8", axis=-2)
    product = jax.jit(matmul)
    for dtype, outliers in CASES:
        x = np.clip(random.standard_normal((ROWS, SIZE), np.float32), -5, 5)
        x[0, random.permutation(SIZE)[:outliers]] = 2 * THRESHOLD
        rows = jnp.asarray(x, dtype)
        functions: dict[str, Callable[[], Any]] = {
            "jaxbnb": lambda rows=rows: product(rows, kernel)
        }
        if is_installed("torch", "bitsandbytes"):
            functions["bitsandbytes"] = _make_bitsandbytes(weight, x, dtype)
        times = time_together(functions, rounds=7)
        detail = ", ".join(f"{k} {milliseconds(v)}" for k, v in times.items())
        name = f"LLM.int8, {ROWS} rows, {dtype}, {outliers} outliers"
        if len(times) == 2:
            value = ratio(times["jaxbnb"], times["bitsandbytes"])
            yield Figure(name, value, "x bitsandbytes' time", 1.0, detail)
        else:
            yield Figure(name, min(times["jaxbnb"]) * 1e3, "ms", None, detail)


def _make_bitsandbytes(
    weight: np.ndarray, x: np.ndarray, dtype: str
) -> Callable[[], Any]:
    import torch
    from bitsandbytes.nn.modules import Linear8bitLt

    # It logs at each call that it rounds its inputs to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    layer = Linear8bitLt(
        SIZE, SIZE, bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.weight.data.copy_(torch.from_numpy(weight))
    # In training mode on a CPU, it would multiply by the decoded matrix.
    layer = layer.to("cpu").eval()
    rows = torch.from_numpy(x).to(getattr(torch, dtype))

    def run():
        with torch.no_grad():
            layer(rows)

    return run
