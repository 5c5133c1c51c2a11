"""Training on a mesh: the numbers of one device, and codes are all that is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.core import QuantizedArray
from jaxbnb.finetune import compile_train_step, fit, split_trainable, train_step
from jaxbnb.planning import collective_bytes
from jaxbnb.sharding import partition_specs, shard_model, use_mesh


def train(model, make, tx=None, steps=5):
    batches = [make.tokens(8, 9, seed=seed) for seed in range(steps)]
    # The codes of a moment may flip by one, 1.4 % of what a step moves: 7e-5 in five.
    tx = jaxbnb.adamw8bit(1e-3, min_quantized_size=0) if tx is None else tx
    losses = fit(model, tx, batches).losses
    return losses, jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))


@pytest.fixture(scope="module")
def want(make):
    return train(make.llama(), make)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_qlora_equals_one_device(make, want, sizes):
    model = make.llama()
    before = nnx.state(model, nnx.Not(nnx.LoRAParam))
    shard_model(model, make.mesh(**sizes))
    shardings = jax.tree.map(lambda x: x.sharding, nnx.state(model))
    losses, adapters = train(model, make)
    np.testing.assert_allclose(losses, want[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
        adapters,
        want[1],
    )
    # Codes are those of one device, and all arrays where they were.
    frozen = nnx.state(model, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    after = jax.tree.map(lambda x: x.sharding, nnx.state(model))
    assert jax.tree.leaves(after) == jax.tree.leaves(shardings)
