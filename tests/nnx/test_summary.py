"""summary: what it counts, and what it takes for trained."""

import jax.numpy as jnp
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig


def make(rngs):
    model = nnx.Sequential(
        nnx.Linear(128, 64, rngs=rngs),
        nnx.Dropout(0.1, rngs=rngs),
        nnx.BatchNorm(64, param_dtype=jnp.bfloat16, rngs=rngs),
    )
    jaxbnb.nnx.quantize_model(model, QuantConfig("nf4", double_quant=True))
    return model


def cells(model, *args):
    """By the first word of a line, its last three columns."""
    _, *lines = jaxbnb.summary(model, *args).splitlines()
    found = {}
    for line in lines:
        words = line.replace(" %", "%").replace("all in  ", "all_in ").split()
        name = words[1] if words[0] == "all_in" else words[0]
        found[name] = words[-3:]
    return found


def test_every_weight_is_counted_and_no_random_key():
    model = make(nnx.Rngs(0))
    got = cells(model)
    kernel = model.layers[0].kernel[...]
    assert got["layers.0.kernel"][-2:] == ["8192", str(kernel.nbytes)]
    assert got["layers.0.bias"] == ["64", "256", "yes"]
    assert got["layers.2.scale"] == ["64", "128", "yes"]
    assert got["layers.2.mean"][-2:] == ["64", "256"]
    assert not any("rngs" in name for name in got)
    total = kernel.nbytes + 256 + 2 * 128 + 2 * 256
    assert got["total"] == [str(8192 + 5 * 64), str(total), "2.3%"]
    assert got["nf4"] == ["8192", str(kernel.nbytes), "0.0%"]
    assert got["bfloat16"] == ["128", "256", "100.0%"]
    # The bias is trained, the statistics of the norm are not.
    assert got["float32"] == ["192", "768", "33.3%"]


def test_of_a_model_with_adapters_these_are_trained():
    model = make(nnx.Rngs(0))
    config = jaxbnb.lora.LoraConfig(r=4, target_modules="all-linear")
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
    got = cells(model)
    trained = [name for name, row in got.items() if row[-1] == "yes"]
    assert sorted(name.rsplit(".")[-1] for name in trained) == ["lora_a", "lora_b"]
    share = 100 * 4 * (128 + 64) / (8192 + 5 * 64 + 4 * (128 + 64))
    assert got["total"][-1] == f"{share:.1f}%"
    params = cells(model, nnx.Param)
    assert params["layers.2.scale"][-1] == "yes"


def test_of_an_abstract_model_it_is_the_same():
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert jaxbnb.summary(abstract) == jaxbnb.summary(make(nnx.Rngs(0)))


def test_a_model_without_weights():
    assert jaxbnb.summary(nnx.Sequential(nnx.relu)).splitlines()[-1].split() == [
        "total",
        "0",
        "0",
    ]


def test_it_needs_a_model():
    with pytest.raises(TypeError, match="NNX model; got ArrayImpl"):
        jaxbnb.summary(jnp.ones(3))
