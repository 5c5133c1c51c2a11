"""Layers against bitsandbytes' `Linear4bit`, `Embedding4bit` and `Embedding8bit`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.nnx import QuantEmbed, QuantLinear

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "layers.npz"))
DTYPES = ["float32", "float16", "bfloat16"]


def golden(name, form, dtype):
    """Returns a stored result as float64. 16-bit results are stored as their bits."""
    return GOLDEN[f"{name}_{form}_{dtype}"].view(jnp.dtype(dtype)).astype(np.float64)


def one_zero(codes):
    """Replaces FP4's second code for zero, which upstream uses, by the first."""
    nibbles = np.stack([codes >> 4, codes & 15])
    return np.where(nibbles == 8, 0, nibbles)


def quant_linear(config):
    weight = jnp.asarray(GOLDEN["weight"].T, jnp.float32)
    plain = nnx.eval_shape(
        lambda: nnx.Linear(*weight.shape, use_bias=False, rngs=nnx.Rngs(0))
    )
    plain.kernel = nnx.Param(weight)
    return QuantLinear.from_linear(plain, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_linear4bit(quant_type, double_quant, dtype):
    """Outputs and input gradients agree."""
    layer = quant_linear(QuantConfig(quant_type, double_quant=double_quant))
    q = layer.kernel[...]
    codes = np.asarray(q.codes).reshape(-1)
    theirs = GOLDEN[f"codes_{quant_type}"]
    if quant_type == "fp4":
        codes, theirs = one_zero(codes), one_zero(theirs)
    np.testing.assert_array_equal(codes, theirs)
    x, dy = (jnp.asarray(GOLDEN[key]).astype(dtype) for key in ("x", "dy"))
    y, pull = jax.vjp(layer, x)
    form = f"{quant_type}{'_double' * double_quant}"
    weight = np.abs(np.asarray(q.dequantize(), np.float64))
    for name, got, rows, matrix in (
        ("y", y, x, weight),
        ("dx", pull(dy)[0], dy, weight.T),
    ):
        assert got.dtype == dtype
        theirs = golden(name, form, dtype)
        terms = np.abs(np.asarray(rows, np.float64)) @ matrix
        # Roundings on either side: five of a decoded weight (its absmax may be
        # decoded too), and the sum.
        tolerance = 2 * 2**-24 * (len(matrix) + 5) * terms
        if dtype != "float32":
            # A decoded weight may be the other side's neighbour. Both results are
            # rounded.
            half = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
            tolerance += half * (2 * terms + 2 * np.abs(theirs)) * 1.01
        assert np.all(np.abs(np.asarray(got, np.float64) - theirs) <= tolerance)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_embeddings(name):
    """Rows equal those of `Embedding4bit` and `Embedding8bit` (LLM.int8's codes)."""
    config = QuantConfig("llm_int8" if name == "int8" else name)
    plain = nnx.Embed(48, 192, rngs=nnx.Rngs(0))
    plain.embedding[...] = jnp.asarray(GOLDEN["weight"], jnp.float32)
    layer = QuantEmbed.from_embed(plain, config)
    rows = layer(jnp.asarray(GOLDEN["ids"]))
    np.testing.assert_allclose(rows, GOLDEN[f"rows_{name}"], rtol=3 * 2**-24)
