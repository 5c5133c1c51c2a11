"""What options of a run do: the rate, weight decay, and noise on embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb.finetune import TrainConfig
from jaxbnb.finetune._neftune import EmbeddingNoise, embedding_noise
from jaxbnb.finetune._optimizer import make_optimizer, make_schedule


def make_config(**changes):
    return TrainConfig(model="m", data="d", out="o", **changes)


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)],
)
def test_schedules(schedule, half, end):
    """A tenth of the steps warms up, and the middle of the rest is at step 11."""
    rate = make_schedule(make_config(lr=1.0, schedule=schedule, warmup=0.1), 20)
    got = [float(rate(step)) for step in (0, 1, 11, 20)]
    np.testing.assert_allclose(got, [0.5, 1.0, half, end], rtol=0, atol=1e-6)


# Two with masks, of other names, and one that gets decayed gradients.
@pytest.mark.parametrize("optimizer", ["adamw8bit", "lars8bit", "sgd8bit"])
def test_weight_decay_leaves_out_norms_and_biases(optimizer):
    params = {
        "norm": {"scale": jnp.ones((4, 8))},
        "up_proj": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones((4, 8))},
    }
    config = make_config(optimizer=optimizer, weight_decay=0.5)
    tx = make_optimizer(config, lambda count: jnp.float32(0.1))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    kernel = updates["up_proj"].pop("kernel")
    for unchanged in jax.tree.leaves(updates):
        np.testing.assert_array_equal(unchanged, 0.0)
    if optimizer == "lars8bit":
        assert np.asarray(kernel).max() < 0
    else:
        np.testing.assert_allclose(kernel, -0.1 * 0.5, rtol=1e-5)


def test_the_noise_is_that_of_the_paper():
    """Uniform between both limits, new for each batch."""
    noise = EmbeddingNoise(5.0, rngs=nnx.Rngs(dropout=0))
    first, second = (np.asarray(noise(jnp.zeros((4, 64, 16)))) for _ in range(2))
    limit = 5.0 / np.sqrt(64 * 16)
    assert 0.99 * limit < np.abs(first).max() <= limit
    # The deviation of 4,096 uniform values, within five of its own of 0.7 %.
    np.testing.assert_allclose(first.std(), limit / np.sqrt(3), rtol=0.035)
    assert np.abs(first - second).max() > limit
    noise.deterministic = True
    x = jnp.ones((1, 2, 16))
    assert noise(x) is x


def test_a_model_has_noise_in_training_only(make):
    model, tokens = make.llama(), jnp.asarray(make.tokens(1, 4))
    model.eval()
    plain = np.asarray(model(tokens))
    with embedding_noise(model, 5.0, seed=0):
        model.eval()
        np.testing.assert_array_equal(model(tokens), plain)
        model.train()
        assert np.abs(np.asarray(model(tokens)) - plain).max() > 1e-3
    np.testing.assert_array_equal(model(tokens), plain)
