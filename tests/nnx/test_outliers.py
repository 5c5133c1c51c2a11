"""outlier_columns: of layers alone, stacked, quantised, adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.clip(x, -5, 5))


class Network(nnx.Module):
    """A layer that is called twice, and one that is not."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 16, rngs=rngs)
        self.unused = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.first(self.first(x) * scale)


def test_of_every_call_of_a_layer():
    model = Network(nnx.Rngs(0))
    x = normal((3, 5, 16)).at[1, 2, 7].set(-6.0)
    between = np.asarray(model.first(x)) * 5.0
    before = jax.tree.map(np.asarray, nnx.state(model))
    columns = jaxbnb.nnx.outlier_columns(model, x, scale=5.0)
    assert columns.keys() == {"first", "unused"}
    want = np.arange(16) == 7
    assert not np.array_equal(np.any(np.abs(between) >= 6, axis=(0, 1)), want)
    want |= np.any(np.abs(between) >= 6, axis=(0, 1))
    np.testing.assert_array_equal(columns["first"], want)
    assert not np.any(columns["unused"])
    # The model is as it was.
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert type(model.first) is nnx.Linear


class Stacked(nnx.Module):
    def __init__(self, remat=False):
        self.layers = jaxbnb.nnx.LayerStack(
            lambda rngs: nnx.Linear(16, 16, rngs=rngs), 3, rngs=nnx.Rngs(0)
        )
        self.remat = remat

    def __call__(self, x):
        return self.layers(lambda layer, x, i: layer(x) * 3.0, x, remat=self.remat)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_of_each_layer_of_a_stack(remat, quantised):
    model = Stacked(remat)
    if quantised:
        jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig("llm_int8"))
    x = normal((5, 16)).at[0, 3].set(6.5)
    (columns,) = jaxbnb.nnx.outlier_columns(model, x).values()
    assert columns.shape == (3, 16)
    np.testing.assert_array_equal(columns[0], np.arange(16) == 3)
    if not quantised:
        for i in range(3):
            want = np.any(np.abs(np.asarray(x)) >= 6, axis=0)
            np.testing.assert_array_equal(columns[i], want)
            layer = model.layers.layer
            x = (x @ layer.kernel[i] + layer.bias[i]) * 3.0
    assert columns[1:].any()


def test_under_an_adapter():
    model = nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig("llm_int8"))
    jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(r=2), rngs=nnx.Rngs(1))
    x = normal((5, 16)).at[:, 9].set(9.0)
    columns = jaxbnb.nnx.outlier_columns(model, x, outlier_threshold=7.0)
    assert {k: v.nonzero()[0].tolist() for k, v in columns.items()} == {
        "layers.0.base": [9]
    }


def test_refusals():
    with pytest.raises(ValueError, match="Sequential has no linear layers"):
        jaxbnb.nnx.outlier_columns(nnx.Sequential(nnx.relu), normal((2, 4)))
    with pytest.raises(ValueError, match="outlier_threshold must be positive"):
        jaxbnb.nnx.outlier_columns(
            Network(nnx.Rngs(0)), normal((2, 16)), outlier_threshold=-1.0
        )
