"""Training on a mesh: the numbers of one device, and codes are all that is sent."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.core import QuantizedArray, tree_nbytes
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
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
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


def test_adapters_placed_by_hand(make, want):
    """They train from where they are, also with paged state, and stay there."""
    model, mesh = make.llama(), make.mesh(data=2, fsdp=2, tensor=2)
    shard_model(model, mesh)
    # Everywhere, along another axis than the weights, and on a single device.
    hands = [
        NamedSharding(mesh, P()),
        NamedSharding(mesh, P(None, "data")),
        mesh.devices.flat[1],
    ]
    adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    placed = [
        (path, x.replace(jax.device_put(x.get_value(), hand)))
        for (path, x), hand in zip(adapters, itertools.cycle(hands))
    ]
    nnx.update(model, nnx.from_flat_state(placed))
    shardings = jax.tree.map(lambda x: x.sharding, nnx.state(model))
    tx = jaxbnb.paged_adamw8bit(1e-3, min_quantized_size=0)
    losses, trained = train(model, make, tx)
    np.testing.assert_allclose(losses, want[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
        trained,
        want[1],
    )
    after = jax.tree.map(lambda x: x.sharding, nnx.state(model))
    assert jax.tree.leaves(after) == jax.tree.leaves(shardings)
    assert jaxbnb.summary(model) == jaxbnb.summary(make.llama(is_abstract=True))


def abstract_step(make, tx, wrt, mesh, **changes):
    """The arrays of a step as shapes on a mesh, and the step, compiled."""
    model = make.llama(is_abstract=True, **changes)
    graphdef, trainable, frozen = split_trainable(model, wrt)
    arrays = trainable, jax.eval_shape(tx.init, trainable), frozen

    def place(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arrays = jax.tree.map(place, arrays, partition_specs(arrays, mesh))
    with use_mesh(mesh):
        compiled = compile_train_step(
            train_step(graphdef, tx),
            *arrays,
            (8, 4),
            batch_sharding=NamedSharding(mesh, P("fsdp")),
        )
    return arrays, compiled


def count_weights(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return sum(x.size for x in leaves if isinstance(x, QuantizedArray))


def test_a_qlora_step_gathers_codes_only(make):
    """Twice, at 0.516 bytes a weight, and as much again as adapters of rank one."""
    quant = jaxbnb.QuantConfig("nf4", block_size=64, double_quant=True)
    tx = jaxbnb.adamw8bit(1e-3)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    arrays, compiled = abstract_step(
        make, tx, nnx.LoRAParam, make.mesh(fsdp=8), quant=quant, rank=1, **sizes
    )
    total = sum(collective_bytes(compiled).values())
    assert 1.03 < total / count_weights(arrays[2]) < 1.3
    # The second call takes what the first returns.
    want = jax.tree.map(lambda x: x.sharding, arrays[:2])
    assert jax.tree.leaves(compiled.output_shardings[:2]) == jax.tree.leaves(want)


def test_all_parameters_send_no_state(make):
    """Weights twice, gradients once. State would be as much as the weights again."""
    tx = jaxbnb.adamw8bit(1e-3)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    arrays, compiled = abstract_step(
        make, tx, nnx.Param, make.mesh(fsdp=8), quant=None, rank=0, **sizes
    )
    found, params = collective_bytes(compiled), tree_nbytes(arrays[0])
    assert found["all-gather"] < 2.05 * params
    # A GPU scatters the sums that a CPU gives to all.
    assert found["all-reduce"] < 1.05 * params
    gathers = [x for x in compiled.as_text().splitlines() if "all-gather(" in x]
    assert not any("u8[" in line for line in gathers)
