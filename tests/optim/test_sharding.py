"""Parameters on an explicit mesh: the same numbers, each device its own blocks."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.optim import fused_step

SPECS = {
    "both axes": ((64, 1024), ("x", "y")),
    "by chunks": ((2048, 2048), ("x", "y")),
    "last axis": ((64, 1024), (None, "y")),
    "two mesh axes on one": ((64, 2048), (None, ("x", "y"))),
    "blocks of rows": ((4096, 16), ("x", None)),
    "within a block": ((4096, 16), (None, "y")),
    "a block would be cut": ((64, 600), ("x", "y")),
    "small, float32": ((8,), ("x",)),
}


@pytest.fixture
def mesh():
    made = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(made):
        yield made


def three_steps(tx, params, gradients, step):
    state = jax.jit(tx.init)(params)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    for grads in gradients:
        params, state = jax.jit(step)(grads, state, params)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    return params, state


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["update", "fused_step"])
@pytest.mark.parametrize(("shape", "spec"), SPECS.values(), ids=SPECS)
def test_the_same_numbers_where_each_device_has_its_own(shape, spec, how, mesh):
    tx = jaxbnb.adamw8bit(1e-2)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = fused_step(tx) if how == "fused_step" else update
    params, *gradients = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    want, want_state = three_steps(tx, params, gradients, step)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    got, state = three_steps(
        tx, jax.device_put(params, place), jax.device_put(gradients, place), step
    )
    assert got.sharding.spec == PartitionSpec(*spec)
    codes = state[0].mu
    assert codes.sharding.spec == PartitionSpec(*spec)
    # XLA may fuse a product with a sum in one of them: a step of float32.
    np.testing.assert_allclose(got, want, rtol=2**-21, atol=2**-21)
    differ = np.asarray(codes, np.int32) != np.asarray(want_state[0].mu, np.int32)
    assert np.mean(differ) < 1e-5
    np.testing.assert_allclose(state[0].nu_absmax, want_state[0].nu_absmax, rtol=2**-21)
