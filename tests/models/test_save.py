import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb.models import load_pretrained, save_pretrained

FILE = "model.safetensors"


def test_an_adapted_quantised_model(toy, tmp_path):
    source = toy.save(toy.model(), tmp_path / "source")
    model = load_pretrained(source, quant="nf4")
    config = jaxbnb.lora.LoraConfig(r=2, init_lora_weights=False)
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"down_proj has adapters; merge them first"):
        save_pretrained(model, tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
    jaxbnb.lora.merge(model)
    saved = save_pretrained(model, tmp_path / "out", source=source)
    assert saved.nbytes == sum(t.nbytes for t in load_file(source / FILE).values())
    loaded = load_pretrained(tmp_path / "out")
    jaxbnb.nnx.dequantize_model(model)
    got, want = (dict(nnx.to_flat_state(nnx.state(m))) for m in (loaded, model))
    assert got.keys() == want.keys()
    for path, variable in got.items():
        np.testing.assert_array_equal(variable[...], want[path][...])


def test_another_model(toy, tmp_path):
    source = toy.save(toy.model(), tmp_path / "source")
    other = toy.model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="belongs to another model"):
        save_pretrained(other, tmp_path / "out", source=source)


def test_sixteen_bits_stay(toy, tmp_path):
    model = toy.model(param_dtype=jnp.bfloat16)
    source = toy.save(model, tmp_path / "source")
    saved = save_pretrained(model, tmp_path / "out", source=source)
    assert saved.config["torch_dtype"] == "bfloat16"
    jax.tree.map(
        np.testing.assert_array_equal,
        load_file(tmp_path / "out" / FILE),
        load_file(source / FILE),
    )
