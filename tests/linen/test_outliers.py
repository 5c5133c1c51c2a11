"""outlier_columns of single, general, stacked and quantised layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb
from jaxbnb.linen import outlier_columns


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.clip(x, -5, 5))


def init(model, *args):
    return jax.jit(model.init)(jax.random.key(0), *args)


class Network(nn.Module):
    """Heads, a layer called twice, experts, and a layer that is never called."""

    everything: bool = False

    @nn.compact
    def __call__(self, x, scale=1.0):
        heads = nn.DenseGeneral((2, 8), name="heads")(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="out")(heads)
        twice = nn.Dense(16, name="twice")
        x = twice(twice(x) * scale)
        experts = nn.Einsum((3, 16, 4), "etd,edf->etf", False, name="experts")
        self.sow("intermediates", "seen", (heads, x))
        y = experts(jnp.stack([x, x * 0, x * 9]))
        return nn.Dense(5, name="unused")(y) if self.everything else y


def test_of_every_call_of_layers_over_any_axes():
    model, x = Network(), normal((7, 16)).at[3, 5].set(-6.0)
    variables = {"params": init(Network(everything=True), x)["params"]}
    columns = outlier_columns(model, variables, x, scale=30.0)
    assert {path: c.shape for path, c in columns.items()} == {
        "heads": (16,),
        "out": (16,),
        "twice": (16,),
        "experts": (3, 16),
    }
    np.testing.assert_array_equal(columns["heads"], np.arange(16) == 5)
    _, seen = model.apply(variables, x, scale=30.0, mutable=["intermediates"])
    ((heads, y),) = seen["intermediates"]["seen"]
    # Columns are the flattened summed axes; each expert has its own.
    np.testing.assert_array_equal(
        columns["out"], np.any(np.abs(heads) >= 6, axis=0).reshape(16)
    )
    large = [np.any(np.abs(y * s) >= 6, axis=0) for s in (1, 0, 9)]
    np.testing.assert_array_equal(columns["experts"], large)
    assert large[2].any()
    # The second call has the outliers, not the first.
    first = outlier_columns(model, variables, x, scale=0.0)["twice"]
    assert columns["twice"].sum() > first.sum()


class Scanned(nn.Module):
    """Layers stacked by nn.scan; each holds two stacked by nn.vmap."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                both = nn.vmap(
                    nn.Dense,
                    in_axes=None,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    axis_size=2,
                )(16)(x)
                return (both[0] - both[1]) * 3, None

        scan = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            check_constancy_invariants=False,
        )
        return scan()(x)[0]


@pytest.mark.parametrize("quantised", [False, True])
def test_of_each_layer_of_a_stack(quantised):
    model, x = Scanned(), normal((5, 16)).at[0, 3].set(6.5)
    variables = init(model, x)
    ((path, params),) = variables["params"].items()
    kernels, biases = params["VmapDense_0"]["kernel"], params["VmapDense_0"]["bias"]
    if quantised:
        config = jaxbnb.QuantConfig("int8", 16)
        variables, _ = jaxbnb.linen.quantize_params(model, variables, x, config=config)
        quantised = variables["params"][path]["VmapDense_0"]["kernel"]
        kernels = quantised.dequantize()
    (columns,) = outlier_columns(model, variables, x).values()
    assert columns.shape == (3, 2, 16)
    for i in range(3):
        want = np.any(np.abs(np.asarray(x)) >= 6, axis=0)
        np.testing.assert_array_equal(columns[i], [want, want])
        both = x @ kernels[i] + biases[i][:, None]
        x = (both[0] - both[1]) * 3
    assert columns[1:].any()


def test_of_layers_that_are_quantised_from_the_start():
    model = nn.Sequential(
        [jaxbnb.QuantDense(8), jaxbnb.linen.QuantDenseGeneral((2, 3))]
    )
    x = normal((5, 16)).at[:, 9].set(9.0)
    columns = outlier_columns(model, init(model, x), x, outlier_threshold=7.0)
    assert columns["layers_0"].nonzero()[0].tolist() == [9]
    assert columns["layers_1"].shape == (8,)


def test_refusals():
    x = normal((2, 16))
    dense, ids = nn.Dense(4), jnp.arange(3)
    embed = nn.Embed(4, 8)
    stacked = nn.vmap(
        nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}
    )
    with pytest.raises(ValueError, match="call of Embed has no linear layers"):
        outlier_columns(embed, init(embed, ids), ids)
    with pytest.raises(ValueError, match="outlier_threshold must be positive"):
        outlier_columns(dense, init(dense, x), x, outlier_threshold=-1.0)
    with pytest.raises(ValueError, match="stacked along another axis than the first"):
        outlier_columns(stacked(4), init(stacked(4), x), x)
