"""Kernels under the names of a checkpoint's tensors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.models.tensors import collect_quantized, name_kernels
from jaxbnb.nnx import QuantLinear, quantize_model


@pytest.mark.parametrize(
    ("quant_type", "double_quant"),
    [("nf4", False), ("nf4", True), ("uint4", False), ("mxfp4", False)],
)
def test_layers_that_share_a_tensor(toy, quant_type, double_quant):
    model = toy.model(model_type="phi3")
    quantize_model(model, QuantConfig(quant_type, double_quant=double_quant))
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


def test_layers_that_cannot_share_a_tensor(toy):
    model = toy.model(model_type="phi3")
    quantize_model(model, "nvfp4")
    with pytest.raises(NotImplementedError, match="with a tensor scale each"):
        collect_quantized(model)
    # One tensor scale is enough for layers that have the same.
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuantLinear):
            q = module.kernel.get_raw_value()
            same = dataclasses.replace(q, nested_absmax=jnp.ones_like(q.nested_absmax))
            module.kernel.set_raw_value(same)
    assert collect_quantized(model)
    model = toy.model(model_type="phi3")
    quantize_model(model, "nf4", rules=[(r".*\.k_proj", QuantConfig("nf4", 32))])
    with pytest.raises(ValueError, match=r"k_proj, .*q_proj, .*\('nf4', 32, False\)"):
        collect_quantized(model)
