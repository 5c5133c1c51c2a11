"""summary: what it counts, and what it takes for trained."""

import flax.linen as nn
import jax
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
    """The last three columns of each line, by its first word."""
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
    with pytest.raises(
        TypeError, match=r"NNX model, or .*; got ArrayImpl.*tree_nbytes"
    ):
        jaxbnb.summary(jnp.ones(3))
    with pytest.raises(TypeError, match=r"got \['bias', 'kernel'\]"):
        jaxbnb.summary({"bias": jnp.ones(3), "kernel": jnp.ones((3, 3))})


def test_a_dict_of_modules_is_a_model_whatever_its_keys():
    model = nnx.Dict(params=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert cells(model)["params.kernel"] == ["6", "24", "yes"]


def boxed(init):
    return nn.with_partitioning(init, ("embed", "mlp"))


@pytest.mark.parametrize("box", [lambda init: init, boxed], ids=["plain", "boxed"])
def test_of_linen_variables(box):
    layer = nn.Dense(64, kernel_init=box(nn.initializers.lecun_normal()))
    x = jnp.ones((1, 128))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables, _ = jaxbnb.linen.quantize_params(layer, variables, x)
    variables["batch_stats"] = {"mean": jnp.zeros(64, jnp.bfloat16)}
    got = cells(variables)
    assert got["params.bias"] == ["64", "256", "yes"]
    assert got["params.kernel"] == ["nf4", "8192", str(8192 // 2 + 8192 // 64 * 4)]
    assert got["batch_stats.mean"] == ["bfloat16", "64", "128"]
    nbytes = jaxbnb.core.tree_nbytes(variables)
    assert got["total"] == [str(8192 + 2 * 64), str(nbytes), f"{6400 / 8320:.1f}%"]
    with pytest.raises(TypeError, match="leave it out for Linen's"):
        jaxbnb.summary(variables, nnx.Param)


def test_of_a_linen_model_with_quantised_layers():
    layer = jaxbnb.QuantDense(64, config="nf4")
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 128)))
    got = cells(variables)
    assert got["params.bias"][-1] == "yes"
    assert got["quantized.kernel"][-3:] == ["nf4", "8192", "4608"]
