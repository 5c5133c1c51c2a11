"""A transformation of ours is a pair to Optax, with a definition that wrappers hide."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb.optim import fused_step
from jaxbnb.optim._transformation import Transformation, definition_of

OURS = {
    "adamw8bit": jaxbnb.adamw8bit(1e-2),
    "scale_by_adam8bit": jaxbnb.optim.scale_by_adam8bit(),
    "quantize_state": jaxbnb.quantize_state(optax.adam(1e-2)),
    "paged": jaxbnb.optim.paged_lion8bit(1e-2),
}
each = pytest.mark.parametrize("tx", OURS.values(), ids=OURS)


@each
def test_it_is_a_pair_to_optax(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    assert optax.with_extra_args_support(tx) is tx


@each
def test_a_copy_keeps_its_definition(tx):
    for again in (jax.tree.map(lambda f: f, tx), copy.copy(tx)):
        assert type(again) is Transformation
        assert again == tx
        assert definition_of(again) is definition_of(tx) is not None


def test_another_update_is_another_transformation():
    def stop(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), state

    params = jnp.ones((64, 64))
    tx = OURS["adamw8bit"]._replace(update=stop)
    assert definition_of(tx) is None
    after, _ = fused_step(tx)(params, tx.init(params), params)
    np.testing.assert_array_equal(after, params)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(tx),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.partition({"a": tx}, "a"),
        lambda tx: optax.inject_hyperparams(lambda rate: tx)(1e-2),
        lambda tx: optax.GradientTransformation(tx.init, tx.update),
    ],
    ids=["chain", "masked", "partition", "inject_hyperparams", "a pair"],
)
def test_wrappers_hide_it(wrap):
    """The step is then that of ``update``, and the same."""
    tx, params = OURS["adamw8bit"], jnp.ones((64, 64))
    wrapped = wrap(tx)
    assert definition_of(wrapped) is None
    got, _ = fused_step(wrapped)(params, wrapped.init(params), params)
    want, _ = fused_step(tx)(params, tx.init(params), params)
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-22)


def test_a_gpu_selects_where_a_cpu_branches():
    """XLA for GPUs copies all that a conditional returns."""
    tx, params = OURS["adamw8bit"], jnp.ones((64, 64))
    arguments = params, tx.init(params), params, jnp.bool_(True)
    traced = jax.jit(fused_step(tx)).trace(*arguments)

    def conditionals(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.case") + text.count("stablehlo.if")

    assert conditionals("cpu") == conditionals("cuda") + 1
