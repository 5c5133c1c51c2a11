"""A calibrated folder in transformers and bitsandbytes."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import convert
from jaxbnb.models.tensors import collect_quantized

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


@jax.jit(static_argnums=0)
def logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def test_they_load_it_and_compute_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float32")
    quant = jaxbnb.QuantConfig("nf4", double_quant=True)
    model = jaxbnb.load_pretrained(tmp_path / "float32")
    tokens = np.random.default_rng(0).integers(0, 128, (2, 32)).astype(np.int32)
    jaxbnb.calibrate(model, [tokens], quant)
    kernels = collect_quantized(model)
    convert.convert_checkpoint(
        tmp_path / "float32", tmp_path / "nf4", quant=quant, quantized=kernels
    )
    loaded = jaxbnb.load_pretrained(tmp_path / "nf4")
    jax.tree.map(np.testing.assert_array_equal, collect_quantized(loaded), kernels)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    # Its products on a CPU round inputs to 16 bits; the decoded weights are exact.
    with torch.no_grad():
        expected = theirs.dequantize()(torch.tensor(tokens).long()).logits.numpy()
    jaxbnb.nnx.dequantize_model(loaded)
    got = logits(*nnx.split(loaded), tokens)
    # float32 sums of up to 192 products through two layers, of logits up to 1.
    np.testing.assert_allclose(got, expected, atol=1e-5)
