"""NF4 of a 4096 x 4096 matrix, compared with bitsandbytes on the same CPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxbnb.benchmarks._figure import Figure, count_temporary_bytes, is_installed
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.core import dequantize, quantize

SIZE = 4096


def bench_quantize() -> Iterator[Figure]:
    """Measures times and temporaries of float32 to NF4, and of NF4 to bfloat16."""
    x = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    q = quantize(x, "nf4")
    encode: dict[str, Callable[[], Any]] = {"jaxbnb": lambda: quantize(x, "nf4")}
    decode: dict[str, Callable[[], Any]] = {
        "jaxbnb": lambda: dequantize(q, jnp.bfloat16)
    }
    if is_installed("torch", "bitsandbytes"):
        encode["bitsandbytes"], decode["bitsandbytes"] = _make_bitsandbytes()
    for name, functions, limit, rounds in (
        ("NF4 quantise, float32", encode, 0.03, 5),
        ("NF4 dequantise, bfloat16", decode, 0.5, 41),
    ):
        times = time_together(functions, rounds=rounds)
        detail = ", ".join(f"{k} {milliseconds(v)}" for k, v in times.items())
        if len(times) == 2:
            value = ratio(times["jaxbnb"], times["bitsandbytes"])
            yield Figure(name, value, "x bitsandbytes' time", limit, detail)
        else:
            yield Figure(name, min(times["jaxbnb"]) * 1e3, "ms", None, detail)
    for name, function, argument in (
        ("NF4 quantise", functools.partial(quantize, quant_type="nf4"), x),
        ("NF4 dequantise", functools.partial(dequantize, dtype=jnp.bfloat16), q),
    ):
        compiled = jax.jit(function).lower(argument).compile()
        temporaries = count_temporary_bytes(compiled)
        yield Figure(
            f"{name}: temporaries", temporaries / x.nbytes, "x the float32 matrix", 1.0
        )


def _make_bitsandbytes():
    import bitsandbytes.functional as bnb
    import torch

    x = torch.randn(SIZE, SIZE)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    state.dtype = torch.bfloat16

    def encode():
        bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")

    def decode():
        bnb.dequantize_4bit(packed, state)

    return encode, decode
