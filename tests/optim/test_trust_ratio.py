"""The trust ratio beside Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb.optim._trust_ratio import scale_by_trust_ratio


def test_it_is_optaxs():
    """Also of zeros, which have no ratio, of numbers, and of other axes."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (64, 33), "vector": (7,), "number": (), "kernel": (3, 3, 4, 5)}
    params, updates = (
        {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    params["zeros"], updates["zeros"] = jnp.zeros(4), jnp.ones(4)
    params["still"], updates["still"] = jnp.ones(4), jnp.zeros(4)
    ours = scale_by_trust_ratio(0.3, 1e-2)
    theirs = optax.scale_by_trust_ratio(trust_coefficient=0.3, eps=1e-2)
    got, state = ours.update(updates, ours.init(params), params)
    want, like = theirs.update(updates, theirs.init(params), params)
    assert state == like
    # Two sums of up to 2112 squares in another order: a few 2^-24 each.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, want)


def test_it_keeps_the_dtype_of_updates():
    tx, ones = scale_by_trust_ratio(), jnp.ones((8, 8))
    updates, _ = tx.update(ones.astype(jnp.bfloat16), optax.EmptyState(), 3 * ones)
    assert updates.dtype == jnp.bfloat16
    assert (updates == 3).all()


@pytest.mark.parametrize("make", [jaxbnb.lars8bit, jaxbnb.lamb8bit])
def test_it_needs_the_parameters(make):
    tx, ones = make(1e-3), jnp.ones((8, 8))
    with pytest.raises(ValueError, match="params"):
        tx.update(ones, tx.init(ones))
    with pytest.raises(ValueError, match="a trust ratio compares updates with params"):
        scale_by_trust_ratio().update(ones, optax.EmptyState())
