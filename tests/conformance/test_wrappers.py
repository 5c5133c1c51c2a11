"""Every optimizer of the table, alone and inside every wrapper in Optax."""

import functools
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxbnb
from jaxbnb.optim import fused_step

pytestmark = pytest.mark.matrix

TABLE = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).parent / "optimizers.py"))
)
every_optimizer = pytest.mark.parametrize("name", TABLE.OPTIMIZERS)
SHAPES = {"w": (32, 160), "b": (7,)}
# XLA may fuse a product and a sum in one program only. That moves a moment by a float32
# step, and now and then changes the code of an element.
NEAR = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture(autouse=True)
def as_optax_expects():
    """Allows the int32 promotions in Optax's schedules and bias corrections."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    pairs = zip(SHAPES.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape) for (name, shape), key in pairs}


PARAMS, GRADIENTS = tree(0), [tree(1), tree(2), tree(3)]


def train(tx, params=PARAMS, gradients=GRADIENTS, step=None):
    """Returns parameters after each step, and the last state; compiles once."""
    traces = []

    @jax.jit
    def one(params, state, grads):
        traces.append(1)
        if step is not None:
            return step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, after = tx.init(params), []
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for grads in gradients:
        params, state = one(params, state, grads)
        after.append(params)
    assert len(traces) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds
    return after, state


def train_eagerly(tx, params=PARAMS, gradients=GRADIENTS):
    """Does the same without compiling the whole, so all share the operations."""
    state, after = tx.init(params), []
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after, state


@functools.cache
def alone(name):
    with jax.numpy_dtype_promotion("standard"):
        return train(TABLE.OPTIMIZERS[name].make())


@functools.cache
def twin_alone(name):
    with jax.numpy_dtype_promotion("standard"):
        return train(TABLE.OPTIMIZERS[name].twin())


@functools.cache
def alone_eagerly(name):
    with jax.numpy_dtype_promotion("standard"):
        return train_eagerly(TABLE.OPTIMIZERS[name].make())


def assert_near_but_for_some_codes(got, want, tolerance):
    """Allows one in 200 to differ, where rounding gave a moment another code."""

    def leaf(a, b):
        apart = ~np.isclose(a, b, rtol=tolerance, atol=tolerance)
        assert np.mean(apart) <= 1 / 200
        np.testing.assert_allclose(a, b, atol=0.05)

    jax.tree.map(leaf, got, want)


def assert_near(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or NEAR)), got, want
    )


# --- Numbers.


@every_optimizer
def test_in_32_bits_it_is_optax(name):
    row = TABLE.OPTIMIZERS[name]
    if name == "sgd8bit dampening":
        with pytest.raises(NotImplementedError, match="does not have dampening"):
            row.make(state_bits=32)
        return
    got, _ = train(row.make(state_bits=32))
    want, _ = twin_alone(name)
    assert_near(got, want, rtol=0, atol=0)


@every_optimizer
def test_with_float32_moments_it_is_optax_but_for_rounding(name):
    row = TABLE.OPTIMIZERS[name]
    got, _ = train(row.make(min_quantized_size=2**40))
    want, _ = twin_alone(name)
    assert_near(got, want)


@every_optimizer
def test_small_parameters_are_not_quantised(name):
    got, _ = alone(name)
    want, _ = twin_alone(name)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours["b"], theirs["b"], **NEAR)


@every_optimizer
def test_bytes_of_state(name):
    row = TABLE.OPTIMIZERS[name]
    # Adafactor does not factor this few rows.
    shapes = {"w": jax.ShapeDtypeStruct((64, 16384), jnp.float32)}
    held = jaxbnb.core.tree_nbytes(jax.eval_shape(row.make().init, shapes))
    # Each moment, a byte or half a byte, adds four bytes of absmax per 256 or 128.
    assert row.num_bytes <= held / 2**20 <= row.num_bytes * (1 + 2 * 4 / 128) + 0.01


@every_optimizer
def test_the_first_step_is_that_of_32_bits(name):
    """It uses the moments before they are rounded."""
    if name in ("adagrad8bit", "rmsprop8bit eps outside") or "schedule_free" in name:
        pytest.skip("its state starts from what is not zero")
    got, _ = alone(name)
    want, _ = twin_alone(name)
    assert_near(got[0], want[0])


# --- Steps that must not move or harm anything.


@every_optimizer
def test_zero_gradients_move_nothing(name):
    row = TABLE.OPTIMIZERS[name]
    options = {k: 0.0 for k in ("weight_decay",) if k in row.options}
    if name in ("adamw4bit", "adamw_fp8"):
        options = {"weight_decay": 0.0}
    tx = row.factory(1e-2, **(row.options | options))
    half = jax.tree.map(lambda g: g.at[..., ::2].set(0.0), GRADIENTS)
    if name == "muon8bit" or "adafactor" in name:
        pytest.skip("its update of an element comes of the whole matrix")
    if name == "yogi in 8 bits":
        pytest.skip("Optax starts its momentum from what is not zero")
    after, _ = train(tx, gradients=half)
    # Averages of equal numbers round.
    rtol = 2**-22 if "schedule_free" in name else 0
    for key, p in PARAMS.items():
        np.testing.assert_allclose(after[-1][key][..., ::2], p[..., ::2], rtol=rtol)


@every_optimizer
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_bad_element_stays_out_of_the_state(value, name):
    """Every absmax of the state stays finite, and so do all blocks."""
    bad = {**GRADIENTS[1], "w": GRADIENTS[1]["w"].at[3, 5].set(value)}
    tx = TABLE.OPTIMIZERS[name].make()
    after, state = train(tx, gradients=[GRADIENTS[0], bad])
    assert not np.isfinite(after[-1]["w"][3, 5])
    if "schedule_free" in name:
        state = state.base_optimizer_state  # Its z holds the parameters.
    if name == "muon8bit" or "adafactor" in name:
        return  # The whole matrix is divided by its norm.
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.all(np.isfinite(leaf.astype(jnp.float32)))


# --- A whole step at once.


@every_optimizer
def test_fused_step(name):
    tx = TABLE.OPTIMIZERS[name].make()
    got, state = train(tx, step=fused_step(tx))
    want, want_state = alone(name)
    assert_near(got, want)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)


# --- Wrappers.


def partitioned(tx):
    return optax.partition({"a": tx, "b": tx}, {"w": "a", "b": "b"})


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": partitioned,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "stochastic_rounding": jaxbnb.optim.stochastic_rounding,
    "conditionally": lambda tx: optax.conditionally_transform(
        tx, lambda count: count < 9
    ),
}


@every_optimizer
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped(wrapper, name):
    got, _ = train_eagerly(WRAPPERS[wrapper](TABLE.OPTIMIZERS[name].make()))
    # Some wrappers compile the inner optimizer.
    assert_near_but_for_some_codes(got, alone_eagerly(name)[0], 2e-6)


@every_optimizer
def test_inject_hyperparams(name):
    """It works without static_args, and the learning rate can change between steps."""
    row = TABLE.OPTIMIZERS[name]
    tx = optax.inject_hyperparams(row.factory)(1e-2, **row.options)
    got, state = train(tx)
    # Hyperparameters are float32, so b2 is off by 3e-8, which is 3e-5 of 1 - b2.
    assert_near_but_for_some_codes(got, alone(name)[0], 2e-5)
    before, _ = tx.update(GRADIENTS[0], state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(5e-3)
    updates, _ = tx.update(GRADIENTS[0], state, PARAMS)
    for new, old in zip(*map(jax.tree.leaves, (updates, before)), strict=True):
        assert np.linalg.norm(new - old) > 1e-3 * np.linalg.norm(old)


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 128), ("min_quantized_size", 0), ("state_bits", 4)],
)
def test_inject_hyperparams_takes_storage_as_static(name, value):
    def make(**options):
        inject = optax.inject_hyperparams(jaxbnb.adamw8bit, **options)
        return inject(1e-2, **{name: value})

    with pytest.raises(TypeError, match=f"{name} decides .* static_args='{name}'"):
        make().init(PARAMS)
    train(make(static_args=name))


@every_optimizer
def test_flatten(name):
    """On one long array, only elementwise optimizers give the same."""
    tx = optax.flatten(TABLE.OPTIMIZERS[name].make())
    after, state = train(tx)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    assert any(x.dtype != jnp.float32 and x.ndim for x in jax.tree.leaves(state))


@every_optimizer
def test_tree_map_params(name):
    """It finds what belongs to a parameter: codes and absmax, but not counts."""
    tx = TABLE.OPTIMIZERS[name].make()
    state = tx.init(PARAMS)
    found = optax.tree_map_params(tx, lambda x: None, state)
    left = jax.tree.leaves(found)
    # Muon's three coefficients are not a parameter's either, and neither is the single
    # zero absmax of an unquantised leaf, nor a count.
    assert all(x.ndim == 0 or x.size in (1, 3) for x in left)
    assert len(left) < len(jax.tree.leaves(state))


@every_optimizer
def test_an_ensemble_by_vmap(name):
    tx = TABLE.OPTIMIZERS[name].make()

    def three(params):
        state = tx.init(params)
        for grads in GRADIENTS:
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    got = jax.jit(jax.vmap(three))(both)
    first = jax.tree.map(lambda x: x[0], got)
    # Norms and matrix products sum whole leaves in another order.
    assert_near_but_for_some_codes(first, alone(name)[0][-1], 1e-4)


@every_optimizer
def test_scan_over_steps(name):
    tx = TABLE.OPTIMIZERS[name].make()

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    (got, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, stacked))(
        (PARAMS, tx.init(PARAMS))
    )
    assert_near(got, alone(name)[0][-1])


@every_optimizer
def test_init_of_shapes(name):
    tx = TABLE.OPTIMIZERS[name].make()
    want = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(PARAMS))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    got = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, shapes))
    assert got == want


@every_optimizer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_16_bits(dtype, name):
    params, *gradients = (
        jax.tree.map(lambda x: x.astype(dtype), t) for t in (PARAMS, *GRADIENTS)
    )
    after, _ = train_eagerly(TABLE.OPTIMIZERS[name].make(), params, gradients)
    assert all(x.dtype == dtype for x in jax.tree.leaves(after))
    assert all(
        np.all(np.isfinite(x.astype(jnp.float32))) for x in jax.tree.leaves(after)
    )


SHAPES_OF_ALL_KINDS = [(), (5000, 1), (3, 3, 32, 64), (40, 333), (0, 4)]


@every_optimizer
def test_any_shape(name):
    # Optax's Muon divides by a matrix's size, which may be zero.
    shapes = [s for s in SHAPES_OF_ALL_KINDS if name != "muon8bit" or 0 not in s]
    params = {str(s): jnp.ones(s) for s in shapes}
    gradients = [jax.tree.map(lambda p: 0.1 * p, params)] * 2
    after, _ = train(TABLE.OPTIMIZERS[name].make(), params, gradients)
    for p, before in zip(*map(jax.tree.leaves, (after[-1], params)), strict=True):
        assert p.shape == before.shape
        assert np.all(np.isfinite(p))
        assert p.size == 0 or np.any(p != before)


# --- Flax.


@every_optimizer
def test_nnx_optimizer(name):
    """It takes three steps. A state of anything but plain arrays fails at step two."""

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(PARAMS["w"])
            self.b = nnx.Param(PARAMS["b"])

    model = Model()
    optimizer = nnx.Optimizer(model, TABLE.OPTIMIZERS[name].make(), wrt=nnx.Param)

    for grads in GRADIENTS:
        state = nnx.state(model, nnx.Param)
        flat = jax.tree.unflatten(jax.tree.structure(state), [grads["b"], grads["w"]])
        optimizer.update(model, flat)
    got = {"w": model.w[...], "b": model.b[...]}
    assert_near(got, alone_eagerly(name)[0][-1])


@every_optimizer
def test_linen_train_state(name):
    tx = TABLE.OPTIMIZERS[name].make()
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    for grads in GRADIENTS:
        state = state.apply_gradients(grads=grads)
    assert_near(state.params, alone_eagerly(name)[0][-1])
