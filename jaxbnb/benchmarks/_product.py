"""One quantised layer, forward and backward, compared with bitsandbytes on a CPU."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._figure import Figure, count_temporary_bytes, is_installed
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.core import QuantConfig, embed, matmul

SIZE, ROWS = 4096, (1, 4, 16, 512)
# Limits of the time in NF4 relative to XLA's product with the float32 matrix.
DENSE_LIMITS = {1: 0.5, 4: None, 16: None, 512: 1.1}
FORMATS = {"nf4": "matmul_4bit", "llm_int8": "MatMul8bitLt"}


def bench_product(size: int = SIZE, rounds: int = 15) -> Iterator[Figure]:
    """Measures the output of a square layer, alone and with its input's gradient.

    In inference bitsandbytes has another kernel than in training.

    The limit of temporaries, for bfloat16, is one decoded matrix, one float32 absmax
    for each 64 elements, and, for each of the one or two products, ten bytes for each
    element of the input. Times are compared in bfloat16 if torch supports it here, else
    in float32.
    """
    random = np.random.default_rng(0)
    weight = random.standard_normal((size, size), np.float32) / size**0.5
    has_peer = is_installed("torch", "bitsandbytes")
    dtype = "float32" if has_peer and not _can_multiply_bfloat16() else "bfloat16"
    for quant_type, theirs in FORMATS.items():
        q = QuantConfig(quant_type).quantize_kernel(jnp.asarray(weight.T))
        for rows in ROWS:
            x = random.standard_normal((rows, size), np.float32)
            decoded = 2 * size**2 + size**2 / 16 + 2**14
            for what in ("inference", "forward", "and gradient"):
                products = 2 if what == "and gradient" else 1
                function = _compute_both if products == 2 else matmul
                name = f"{quant_type}, {rows} rows, {what}"
                if what != "inference":
                    limit = (decoded + 10 * products * x.size) / 2**20
                    abstract = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
                    compiled = jax.jit(function).lower(abstract, q).compile()
                    mib = count_temporary_bytes(compiled) / 2**20
                    yield Figure(name, mib, "MiB of temporaries", limit)
                functions = {"jaxbnb": _compile(function, jnp.asarray(x, dtype), q)}
                if has_peer:
                    functions[theirs] = make_bitsandbytes(
                        weight, x, quant_type, dtype, what
                    )
                times = time_together(functions, rounds=rounds)
                detail = ", ".join(f"{k} {milliseconds(v)}" for k, v in times.items())
                name += f", {dtype}"
                if has_peer:
                    value = ratio(times["jaxbnb"], times[theirs])
                    yield Figure(name, value, f"x {theirs}'s time", 1.0, detail)
                else:
                    yield Figure(name, min(times["jaxbnb"]) * 1e3, "ms", None, detail)
    yield from _beside_dense(jnp.asarray(weight.T), random, rounds)
    rows = jax.eval_shape(
        lambda: QuantConfig().quantize_embedding(jnp.zeros((size,) * 2))
    )
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)
    mib = count_temporary_bytes(jax.jit(embed).lower(ids, rows).compile()) / 2**20
    yield Figure(
        "nf4, 512 rows of an embedding",
        mib,
        "MiB of temporaries",
        # The codes of these rows, and their elements in int32 and float32.
        9 * 512 * size / 2**20,
        f"the whole embedding would take {4 * size**2 / 2**20:.0f} MiB",
    )


def _beside_dense(
    kernel: jax.Array, random: np.random.Generator, rounds: int
) -> Iterator[Figure]:
    """Compares with the product that a model without quantised layers would run."""
    q = QuantConfig("nf4").quantize_kernel(kernel)
    for rows, limit in DENSE_LIMITS.items():
        x = jnp.asarray(random.standard_normal((rows, kernel.shape[0]), np.float32))
        functions = {
            "NF4": _compile(matmul, x, q),
            "dense": _compile(jnp.matmul, x, kernel),
        }
        times = time_together(functions, rounds=rounds)
        yield Figure(
            f"nf4, {rows} rows, forward, beside the float32 matrix",
            ratio(times["NF4"], times["dense"]),
            "x XLA's time",
            limit,
            ", ".join(f"{k} {milliseconds(v)}" for k, v in times.items()),
        )


def _compute_both(x, q):
    """Computes the output, and the input's gradient for a cotangent of its size."""
    y, pull_back = jax.vjp(lambda x: matmul(x, q), x)
    return y, pull_back(x)[0]


def _compile(function: Callable[..., Any], x: Any, q: Any) -> Callable[[], Any]:
    compiled = jax.jit(function).lower(x, q).compile()
    return lambda: compiled(x, q)


def _can_multiply_bfloat16() -> bool:
    """Whether torch can; on some machines it dies from an illegal instruction."""
    code = "import torch; x = torch.ones(64, 64).bfloat16(); x @ x"
    # -P keeps Python from importing from the current folder, e.g. a torch.py.
    command = [sys.executable, "-P", "-c", code]
    return not subprocess.run(command, check=False).returncode


def make_bitsandbytes(
    weight: np.ndarray, x: np.ndarray, quant_type: str, dtype: str, what: str
) -> Callable[[], Any]:
    """Returns a function that runs a layer.

    Args:
        weight: ``(out, in)``, float32.
        x: input of the layer, float32.
        quant_type: a key of ``FORMATS``.
        dtype: dtype of the product.
        what: "forward" or "and gradient" of training, or "inference", for which
            bitsandbytes packs NF4 anew where the processor has AVX-512 BF16.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    options: dict[str, Any] = {"bias": False}
    if quant_type == "nf4":
        options |= {"compute_dtype": getattr(torch, dtype), "quant_type": "nf4"}
        layer = Linear4bit(*weight.shape, **options)
    else:
        options |= {"has_fp16_weights": False, "threshold": 6.0}
        layer = Linear8bitLt(*weight.shape, **options)
    layer.weight.data.copy_(torch.from_numpy(weight))
    layer = layer.to("cpu")
    inputs = torch.from_numpy(x).to(getattr(torch, dtype))
    if what == "inference":
        layer.eval()
        return torch.inference_mode()(lambda: layer(inputs))
    inputs.requires_grad_()
    cotangent = inputs.detach().clone()

    def run() -> None:
        y = layer(inputs)
        if what == "and gradient":
            torch.autograd.grad(y, inputs, cotangent)

    return run
