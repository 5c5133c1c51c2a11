"""tune: the predictions come nearer to the float model's, in the same format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.calibration import _tune, compare, tune
from tests.calibration.toy import make_model, tokens

INT4 = jaxbnb.QuantConfig("int4", block_size=16, double_quant=True)


def test_a_language_model():
    reference = make_model()
    model = nnx.merge(*nnx.split(reference))
    jaxbnb.nnx.quantize_model(model, INT4)
    before = nnx.to_pure_dict(nnx.state(model))
    held_out = tokens(4, seed=1)
    divergence = compare(model, reference, held_out).kl
    seen = []
    values = tune(
        model,
        reference,
        tokens(4, seed=0),
        steps=24,
        learning_rate=0.01,
        progress=lambda *x: seen.append(x),
    )
    assert seen == [(i, 24, "tuning") for i in range(1, 25)]
    assert np.mean(values[-4:]) < np.mean(values[:4])
    assert compare(model, reference, held_out).kl < divergence
    # Only absmax have changed.
    after = nnx.to_pure_dict(nnx.state(model))
    changed = set()
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        if (np.asarray(old) != np.asarray(new)).any():
            changed.add(jax.tree_util.keystr(path[-1:]))
    assert changed == {".absmax", ".nested_absmax", ".offset"}
    assert isinstance(model.model.layers.layer.mlp.up_proj, jaxbnb.nnx.QuantLinear)
    assert not model.model.layers.remat


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_the_product_and_its_gradient(quant_type):
    """The gradient is that of the decoded kernel, block by block."""
    linear = nnx.Linear(40, 6, rngs=nnx.Rngs(0))
    config = jaxbnb.QuantConfig(quant_type, block_size=16)
    layer = jaxbnb.nnx.QuantLinear.from_linear(linear, config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 40)), jnp.float32)
    tuned = _tune._Tuned(layer)
    # 40 products, rounded in another order.
    np.testing.assert_allclose(tuned(x), layer(x), rtol=1e-5, atol=1e-5)
    graphdef, factor, rest = nnx.split(tuned, _tune._Factor, ...)

    def loss(factor):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, factor, rest)(x)))

    (gradient,) = jax.tree.leaves(jax.grad(loss)(factor))
    q = layer.kernel.get_raw_value()
    kernel = np.asarray(q.dequantize(), np.float64)
    by_weight = np.asarray(x).T @ np.cos(np.asarray(layer(x))) * kernel
    by_weight = np.pad(by_weight, [(0, 8), (0, 0)]).reshape(3, 16, 6)
    np.testing.assert_allclose(gradient, by_weight.sum(1).T, rtol=1e-4, atol=1e-5)
    scaled = _tune._scale_absmax(q, jnp.full(q.absmax.shape, 0.5))
    expected = dataclasses.replace(q, absmax=q.absmax / 2)
    jax.tree.map(np.testing.assert_array_equal, scaled, expected)


def test_errors():
    reference = make_model()
    with pytest.raises(ValueError, match="steps must be at least 0"):
        tune(reference, reference, tokens(1, 0), steps=-1)
    with pytest.raises(ValueError, match="needs batches of text"):
        tune(reference, reference, [])
    with pytest.raises(ValueError, match="quantise the model first"):
        tune(reference, reference, tokens(1, 0))
    adapted = nnx.merge(*nnx.split(reference))
    jaxbnb.lora.add_adapter(adapted, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="before they are added"):
        tune(adapted, reference, tokens(1, 0))
