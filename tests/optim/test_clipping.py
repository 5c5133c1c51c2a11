"""percentile_clipping against its definition, written again in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbnb.optim._clipping import percentile_clipping

SHAPES = {"a": (3, 4), "b": (5,)}


def gradients(steps, seed=0, spread=1.0):
    """Draws normal gradients; each leaf and step has its own scale."""
    generator = np.random.default_rng(seed)
    return {
        name: np.float32(
            generator.standard_normal((steps, *shape))
            * generator.lognormal(0, spread, (steps, *(1 for _ in shape)))
        )
        for name, shape in SHAPES.items()
    }


def run(tx, grads):
    """Returns all updates, stacked like the gradients, and the last state."""

    @jax.jit
    def scanned(state, grads):
        def body(state, g):
            updates, state = tx.update(g, state)
            return state, updates

        return jax.lax.scan(body, state, grads)

    state = tx.init(jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads))
    state, updates = scanned(state, jax.tree.map(jnp.asarray, grads))
    return updates, state


def oracle(grads, percentile, history):
    """Computes in float64 what bitsandbytes did, for a tensor, or a list with one norm.

    Its kernel wrote the squared norm before reading it, and `vals` had 100 entries. The
    rule for norms that are not recorded is ours.
    """
    squared_norms = np.zeros(history)
    results = []
    for step, gs in enumerate(grads, 1):
        gs = [np.float64(g) for g in gs]
        square = sum(np.sum(g**2) for g in gs)
        scale = 1.0
        if np.isfinite(square) and square > 0:
            if not squared_norms.any():
                squared_norms[:] = square
            squared_norms[step % history] = square
            limit = np.sqrt(np.sort(squared_norms)[percentile * history // 100])
            if np.sqrt(square) > limit:
                scale = limit / np.sqrt(square)
        results.append([g * scale for g in gs])
    return results, squared_norms


def tolerance(elements):
    """Returns the tolerance: two norms (sums under a root), a division, a product.

    If norm and limit are a rounding apart, the choice to clip may differ, and the
    result by as much.
    """
    return (elements + 6) * 2.0**-24


@pytest.mark.parametrize(
    ("percentile", "history"), [(5, 100), (0, 100), (99, 100), (50, 7), (10, 2)]
)
@pytest.mark.parametrize("per_leaf", [True, False])
def test_it_is_the_definition(percentile, history, per_leaf):
    """Takes 250 steps, more than twice around the history."""
    grads = gradients(250)
    tx = percentile_clipping(percentile, history, per_leaf=per_leaf)
    updates, state = run(tx, grads)
    groups = [["a"], ["b"]] if per_leaf else [["a", "b"]]
    for i, names in enumerate(groups):
        rows = zip(*(grads[name] for name in names), strict=True)
        want, squared_norms = oracle(rows, percentile, history)
        elements = sum(grads[name][0].size for name in names)
        np.testing.assert_allclose(
            state.squared_norms[i], squared_norms, rtol=elements * 2.0**-24
        )
        for j, name in enumerate(names):
            stacked = np.stack([row[j] for row in want])
            np.testing.assert_allclose(updates[name], stacked, rtol=tolerance(elements))
            clipped = np.mean(np.any(stacked != grads[name], axis=1))
            # A low percentile clips sometimes; none below 100 clips always.
            assert clipped < 1
            assert clipped > 0.5 or percentile > 50 or history < 10
    assert state.squared_norms.shape == (len(groups), history)
    assert state.count == 250


def test_a_step_by_hand():
    """At step 1 all 100 are 4. Then 5 smaller ones take the five lowest places."""
    tx = percentile_clipping()
    state = tx.init(jnp.zeros(1))

    def clip(value, state):
        updates, state = tx.update(jnp.asarray([value]), state)
        return float(updates[0]), state

    got, state = clip(2.0, state)
    assert got == 2
    np.testing.assert_array_equal(state.squared_norms, np.full((1, 100), 4.0))
    got, state = clip(-6.0, state)
    assert got == -2
    assert state.squared_norms[0, 2] == 36
    for _ in range(5):
        got, state = clip(1.0, state)
        assert got == 1
    got, state = clip(8.0, state)
    assert got == 2  # vals[5] is the sixth.
    got, state = clip(1.0, state)
    got, state = clip(8.0, state)
    assert got == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_passes_and_leaves_no_trace(bad, first):
    """1e30 is finite, but its square is not."""
    tx = percentile_clipping(50, 4)
    state = tx.init({"a": jnp.zeros(3), "b": jnp.zeros(2)})
    good = {"a": jnp.ones(3), "b": jnp.ones(2)}
    if not first:
        _, state = tx.update(good, state)
    broken = {"a": jnp.asarray([1.0, bad, 2.0]), "b": 4 * jnp.ones(2)}
    updates, after = tx.update(broken, state)
    np.testing.assert_array_equal(updates["a"], broken["a"])
    np.testing.assert_array_equal(after.squared_norms[0], state.squared_norms[0])
    # The other leaf is clipped as usual.
    np.testing.assert_array_equal(updates["b"], broken["b"] if first else good["b"])
    updates, after = tx.update(good, after)
    np.testing.assert_array_equal(updates["a"], good["a"])
    np.testing.assert_allclose(after.squared_norms[0], np.full(4, 3.0), rtol=2**-22)


def test_of_a_norm_over_all_one_bad_leaf_lets_all_pass():
    tx = percentile_clipping(per_leaf=False)
    grads = {"a": jnp.ones(3), "b": jnp.ones(2)}
    _, state = tx.update(grads, tx.init(grads))
    broken = {"a": jnp.full(3, jnp.nan), "b": jnp.full(2, 100.0)}
    updates, after = tx.update(broken, state)
    jax.tree.map(np.testing.assert_array_equal, updates, broken)
    np.testing.assert_array_equal(after.squared_norms, state.squared_norms)


def test_gradients_of_zero_do_not_set_the_limit():
    """A first gradient of zero does not, as lora_a has, nor do most of them."""
    tx = percentile_clipping(5, 10)
    state = tx.init(jnp.zeros(4))
    updates, state = tx.update(jnp.zeros(4), state)
    np.testing.assert_array_equal(updates, np.zeros(4))
    for _ in range(3):
        updates, state = tx.update(jnp.ones(4), state)
        np.testing.assert_array_equal(updates, np.ones(4))
        for _ in range(9):
            updates, state = tx.update(jnp.zeros(4), state)
            np.testing.assert_array_equal(updates, np.zeros(4))
    np.testing.assert_array_equal(state.squared_norms, np.full((1, 10), 4.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_norms_are_float32_and_updates_of_the_gradients_dtype(dtype):
    """300^2 exceeds float16, and bfloat16 cannot sum 4096 ones."""
    tx = percentile_clipping()
    state = tx.init(jnp.zeros(4097, dtype))
    assert state.squared_norms.dtype == jnp.float32
    _, state = tx.update(jnp.ones(4097, dtype), state)
    np.testing.assert_array_equal(state.squared_norms, np.full((1, 100), 4097.0))
    updates, state = tx.update(jnp.full(4097, 300.0, dtype), state)
    assert updates.dtype == dtype
    np.testing.assert_allclose(updates.astype(jnp.float32), 1, rtol=tolerance(0))
    assert state.squared_norms[0, 2] == 4097 * 300.0**2


def test_complex_gradients():
    tx = percentile_clipping()
    state = tx.init(jnp.zeros(2, jnp.complex64))
    _, state = tx.update(jnp.asarray([3j, 4.0 + 0j], jnp.complex64), state)
    updates, state = tx.update(jnp.asarray([6j, -8.0 + 0j], jnp.complex64), state)
    np.testing.assert_allclose(updates, np.asarray([3j, -4.0]), rtol=tolerance(4))


# --- With parts of JAX, Optax and Flax.


def test_compiled_one_step_at_a_time_it_compiles_once():
    grads = gradients(12)
    tx = percentile_clipping(50, 5)
    want, want_state = run(tx, grads)
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    step = jax.jit(tx.update)
    for t in range(12):
        updates, state = step(
            jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), grads), state
        )
        for name in SHAPES:
            np.testing.assert_allclose(updates[name], want[name][t], rtol=tolerance(12))
    assert step._cache_size() == 1
    assert jax.tree.structure(state) == jax.tree.structure(want_state)


def test_vmap_is_an_ensemble():
    members = [gradients(20, seed) for seed in range(3)]
    tx = percentile_clipping(20, 10)

    def all_steps(state, grads):
        def body(state, g):
            updates, state = tx.update(g, state)
            return state, updates

        return jax.lax.scan(body, state, grads)[1]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *members)
    params = jax.tree.map(lambda g: g[:, 0], stacked)
    states = jax.vmap(tx.init)(params)
    got = jax.vmap(all_steps)(states, stacked)
    for i, grads in enumerate(members):
        want, _ = run(tx, grads)
        for name in SHAPES:
            np.testing.assert_allclose(got[name][i], want[name], rtol=tolerance(12))


@pytest.mark.parametrize("per_leaf", [True, False])
def test_init_of_shapes(per_leaf):
    tx = percentile_clipping(per_leaf=per_leaf)
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    want = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    got = tx.init(jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_specs_of_parameters_are_not_those_of_the_norms():
    tx = optax.chain(percentile_clipping(), optax.trace(0.9))
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    specs = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(params),
        {"a": "spec of a", "b": "spec of b"},
        transform_non_params=lambda _: "everywhere",
    )
    assert specs[0] == ("everywhere", "everywhere")
    assert specs[1].trace == {"a": "spec of a", "b": "spec of b"}


def test_masked_and_without_any_leaf():
    grads = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    masked = optax.masked(percentile_clipping(), {"a": False, "b": True})
    _, state = masked.update(grads, masked.init(grads))
    updates, state = masked.update(jax.tree.map(lambda g: 3 * g, grads), state)
    np.testing.assert_array_equal(updates["a"], 3 * grads["a"])
    np.testing.assert_allclose(updates["b"], grads["b"], rtol=tolerance(5))
    for per_leaf in (True, False):
        none = optax.masked(percentile_clipping(per_leaf=per_leaf), False)
        updates, state = none.update(grads, none.init(grads))
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
        assert state.inner_state.count == 1


def test_sharded_gradients():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    generator = np.random.default_rng(0)
    tx = percentile_clipping(50, 3)
    step = jax.jit(tx.update)
    state = want_state = tx.init(jnp.zeros((16, 4)))
    for _ in range(4):
        g = jnp.asarray(generator.standard_normal((16, 4)), jnp.float32)
        want, want_state = step(g, want_state)
        updates, state = step(jax.device_put(g, sharding), state)
        assert updates.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(updates, want, rtol=tolerance(64))
    assert state.squared_norms.sharding.is_fully_replicated


def test_nnx_optimizer():
    model = nnx.Linear(4, 4, use_bias=True, rngs=nnx.Rngs(0))
    tx = optax.chain(percentile_clipping(), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, size):
        grads = jax.tree.map(lambda p: size * jnp.ones_like(p), nnx.state(model))
        optimizer.update(model, grads)

    start = np.asarray(model.bias[...])
    step(model, optimizer, jnp.float32(1.0))
    step(model, optimizer, jnp.float32(100.0))
    np.testing.assert_allclose(model.bias[...], start - 2, rtol=tolerance(4))


# --- Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 100}, "percentile must be an int from 0 to 99; got 100"),
        ({"percentile": -1}, "percentile must be an int from 0 to 99; got -1"),
        ({"percentile": 5.0}, "percentile must be an int from 0 to 99; got 5.0"),
        ({"percentile": True}, "percentile must be an int from 0 to 99; got True"),
        ({"history": 1}, "history must be an int of at least 2; got 1"),
        ({"history": None}, "history must be an int of at least 2; got None"),
        ({"per_leaf": 1}, "per_leaf must be True or False; got 1"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        percentile_clipping(**options)


def test_a_state_of_other_parameters():
    tx = percentile_clipping()
    state = tx.init([jnp.zeros(2)] * 3)
    with pytest.raises(ValueError, match=r"2 leaves and the state has norms of 3\."):
        tx.update([jnp.zeros(2)] * 2, state)
