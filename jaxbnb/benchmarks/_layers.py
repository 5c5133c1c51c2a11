"""Memory and speed of quantised layers, with their backward pass."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxbnb.benchmarks._figure import Figure, count_temporary_bytes
from jaxbnb.benchmarks._int8 import bench_int8
from jaxbnb.benchmarks._product import bench_product
from jaxbnb.core import matmul, quantize

LAYERS, WIDTH, BATCH = 8, 1024, 64


def bench_layers() -> Iterator[Figure]:
    """Measures the temporaries of a gradient through 8 layers, then single layers."""
    x = jnp.ones((BATCH, WIDTH))
    kernels = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH))

    def loss(x, q):
        def layer(x, q):
            return jnp.tanh(matmul(x, q)), None

        return jnp.sum(jax.lax.scan(layer, x, q)[0])

    for quant_type in ("nf4", "int8"):
        q = quantize(kernels, quant_type, axis=-2, double_quant=True)
        compiled = jax.jit(jax.grad(loss)).lower(x, q).compile()
        mib = count_temporary_bytes(compiled) / 2**20
        yield Figure(
            f"gradient of {LAYERS} scanned layers, {quant_type}",
            mib,
            "MiB of temporaries",
            20.0,
            f"float32 kernels would take {kernels.nbytes / 2**20:.0f} MiB",
        )
    yield from bench_product()
    yield from bench_int8()
