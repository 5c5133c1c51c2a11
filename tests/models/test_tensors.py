"""Kernels under the names of a checkpoint's tensors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb import QuantConfig
from jaxbnb.models.tensors import collect_quantized, name_kernels
from jaxbnb.nnx import quantize_model


@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_that_share_a_tensor(toy, double_quant):
    model = toy.model(model_type="phi3")
    quantize_model(model, QuantConfig("nf4", double_quant=double_quant))
    kernels = collect_quantized(model)
    attention = model.model.layers.layer.self_attn
    name = "model.layers.1.self_attn.qkv_proj.weight"
    for letter in "qkv":
        path = f"model.layers.layer.self_attn.{letter}_proj"
        assert name in name_kernels(model)[path]
    parts = [getattr(attention, f"{x}_proj").kernel.get_raw_value()[1] for x in "qkv"]
    want = jnp.concatenate([part.dequantize() for part in parts], axis=1)
    got = kernels[name].dequantize()
    if double_quant:
        # Each absmax is rounded once more, by at most half of the widest cell of the
        # signed map, 0.9 / 64 / 2 of the largest distance from their mean.
        largest = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got, want, atol=0.9 / 128 * largest)
    else:
        np.testing.assert_array_equal(got, want)
