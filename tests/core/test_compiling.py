"""Programs of whole models: without copies of their layers in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import adamw8bit
from jaxbnb.core import compiling
from jaxbnb.core.compiling import compiler_options, jit_model
from jaxbnb.finetune import _step, fit, perplexity
from jaxbnb.models import Llama, LlamaConfig, generate
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


def test_steps_and_generation_are_compiled_so(monkeypatch):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    seen = []

    def note(arguments):
        seen.append(arguments)
        return compiler_options(arguments)

    for module in (compiling, _step):
        monkeypatch.setattr(module, "compiler_options", note)
    bfloat16 = jnp.bfloat16
    model = Llama(config, dtype=jnp.float32, param_dtype=bfloat16, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None]
    generate(model, tokens, 2)
    assert len(seen) == 1
    perplexity(model, tokens)
    assert len(seen) == 2
    fit(model, adamw8bit(1e-3), [tokens], wrt=nnx.Param)
    assert len(seen) == 3
