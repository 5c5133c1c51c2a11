"""Programs of whole models: without copies of their layers in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.core.compiling import compiler_options, jit_model
from jaxbnb_kernels.matmul_dense import matmul_dense


def run_layers(kernels, x):
    def body(x, kernel):
        return jnp.tanh(matmul_dense(x, kernel)), None

    return jax.lax.scan(body, x, kernels)[0]


def make(dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    kernels = random.standard_normal((8, 64, 64)) / 8
    return jnp.asarray(kernels, dtype), jnp.ones((2, 64), dtype)


def test_16_bit_layers_are_not_held_in_float32():
    kernels, x = make()
    lowered = jax.jit(run_layers).lower(kernels, x)
    compiled = lowered.compile(compiler_options((kernels, x)))
    assert compiled.memory_analysis().temp_size_in_bytes < kernels.nbytes


def test_other_programs_are_xlas_own():
    assert compiler_options(make(jnp.float32)) is None
    assert compiler_options({"codes": jnp.zeros(3, jnp.uint8), "step": 3}) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_jit(dtype):
    """Alone, within another program, and differentiated."""
    kernels, x = make(dtype)
    ours, plain = jit_model()(run_layers), jax.jit(run_layers)

    def slope(run):
        return jax.grad(lambda x: jnp.sum(run(kernels, x).astype(jnp.float32)))(x)

    for got, want in (
        (ours(kernels, x), plain(kernels, x)),
        (jax.jit(ours)(kernels, x), plain(kernels, x)),
        (jax.jit(lambda: ours(kernels, x))(), plain(kernels, x)),
        (slope(ours), slope(plain)),
    ):
        np.testing.assert_array_equal(got, want)
