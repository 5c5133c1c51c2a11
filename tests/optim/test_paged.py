"""paged: the same steps, with the state in host memory between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.optim import paged, unpage

PAIRS = {
    "adam8bit": (jaxbnb.paged_adam8bit, jaxbnb.adam8bit),
    "adamw8bit": (jaxbnb.paged_adamw8bit, jaxbnb.adamw8bit),
}


def params_and_gradients(steps=3):
    def normal(seed):
        generator = np.random.default_rng(seed)
        shapes = {"w": (8, 512), "b": (300,)}
        return {
            name: jnp.asarray(generator.standard_normal(shape), jnp.float32)
            for name, shape in shapes.items()
        }

    return normal(0), [normal(1 + t) for t in range(steps)]


def make_step(tx, **options):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **options)


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        got,
        want,
    )


@pytest.mark.parametrize(("make", "make_unpaged"), PAIRS.values(), ids=PAIRS)
def test_the_state_lives_on_the_host_and_the_numbers_are_the_same(make, make_unpaged):
    params, gradients = params_and_gradients()
    options = {"b1": 0.8, "block_size": 128}
    tx, unpaged = make(1e-2, **options), make_unpaged(1e-2, **options)
    step, unpaged_step = make_step(tx), make_step(unpaged)
    # The state is committed to its device. Uncommitted parameters would be committed
    # after the first step, and the second step would compile anew.
    params, gradients = jax.device_put((params, gradients), jax.devices()[0])
    state, want, want_state = tx.init(params), params, unpaged.init(params)
    assert kinds(state) == {"pinned_host"}
    assert_same(unpage(tx, state, params), want_state)
    for grads in gradients:
        params, state = step(params, state, grads)
        want, want_state = unpaged_step(want, want_state, grads)
        assert kinds(state) == {"pinned_host"}
        assert kinds(params) == kinds(grads) == {"device"}
        assert_same((params, unpage(tx, state, params)), (want, want_state))
    assert step._cache_size() == 1


def test_the_compiled_step_takes_no_device_memory_for_the_state():
    """XLA accounts for it as an argument and a result in host memory."""
    params, (grads,) = params_and_gradients(1)
    tx = jaxbnb.paged_adamw8bit(1e-2)
    state = tx.init(params)
    compiled = make_step(tx).lower(params, state, grads).compile()
    out_params, out_state = compiled.output_shardings
    assert {s.memory_kind for s in jax.tree.leaves(out_state)} == {"pinned_host"}
    assert {s.memory_kind for s in jax.tree.leaves(out_params)} == {"device"}
    (_, in_state, _), _ = compiled.input_shardings
    assert {s.memory_kind for s in jax.tree.leaves(in_state)} == {"pinned_host"}


def test_donating_parameters_and_state():
    params, gradients = params_and_gradients()
    tx = jaxbnb.paged_adamw8bit(1e-2)
    step, donating = make_step(tx), make_step(tx, donate_argnums=(0, 1))
    want, want_state = params, tx.init(params)
    got, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for grads in gradients:
        want, want_state = step(want, want_state, grads)
        old = got
        got, state = donating(got, state, grads)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert kinds(state) == {"pinned_host"}
    assert_same((got, state), (want, want_state))


def test_any_transformation():
    """It works on more than our own, and passes extra arguments on."""
    params, (grads,) = params_and_gradients(1)
    seen = []

    def update(updates, state, params=None, *, value, **_):
        seen.append(value)
        return updates, state + 1

    inner = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    tx = paged(optax.chain(optax.trace(0.9), inner))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params, value="loss")
    assert seen == ["loss"]
    assert_same(updates, grads)
    assert kinds(state) == {"pinned_host"}
    assert unpage(tx, state, params)[1] == 1


def test_outermost_of_a_chain_and_of_multi_steps():
    params, gradients = params_and_gradients(2)
    inner = optax.chain(optax.clip_by_global_norm(1.0), jaxbnb.adamw8bit(1e-2))
    tx = paged(optax.MultiSteps(inner, every_k_schedule=2))
    step, state = make_step(tx), tx.init(params)
    # MultiSteps divides by an int.
    with jax.numpy_dtype_promotion("standard"):
        for moved, grads in zip((False, True), gradients, strict=True):
            old = params
            params, state = step(params, state, grads)
            assert kinds(state) == {"pinned_host"}
            for a, b in zip(*map(jax.tree.leaves, (params, old)), strict=True):
                assert np.all((a != b) == moved)
    assert state.gradient_step == 1


def test_inside_multi_steps_it_raises():
    """A conditional's branches may not differ in memory space."""
    params, (grads,) = params_and_gradients(1)
    tx = optax.MultiSteps(jaxbnb.paged_adamw8bit(1e-2), every_k_schedule=2)
    state = tx.init(params)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(TypeError, match="cond branches must"),
    ):
        make_step(tx)(params, state, grads)


def test_init_compiled_and_of_shapes():
    tx = jaxbnb.paged_adam8bit(1e-2)
    params, _ = params_and_gradients(0)
    want = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(jnp.shape, want)
    for state in (jax.jit(tx.init)(params), tx.init(jax.eval_shape(lambda: params))):
        assert kinds(state) == {"pinned_host"}
        assert_same(state, want)
    labels = optax.tree_map_params(tx, lambda _: "of a parameter", want)
    assert labels[0].mu == {"w": "of a parameter", "b": "of a parameter"}


def test_under_scan():
    params, gradients = params_and_gradients()
    tx = jaxbnb.paged_adamw8bit(1e-2)

    @jax.jit
    def run(params, state, gradients):
        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), gradients)[0]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    got, state = run(params, tx.init(params), stacked)
    want, want_state = params, tx.init(params)
    step = make_step(tx)
    for grads in gradients:
        want, want_state = step(want, want_state, grads)
    assert_same(state, want_state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2**-22), got, want
    )


@pytest.mark.parametrize(
    "placed",
    [
        True,
        False,
    ],
    ids=["placed by hand", "as init places it"],
)
def test_sharded_parameters(placed):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def shard(tree, **options):
        return jax.tree.map(
            lambda x: jax.device_put(
                x,
                NamedSharding(
                    mesh,
                    PartitionSpec("x") if x.ndim == 2 else PartitionSpec(),
                    **options,
                ),
            ),
            tree,
        )

    params, gradients = params_and_gradients(2)
    tx = jaxbnb.paged_adamw8bit(1e-2)
    step = make_step(tx)
    want, want_state = params, tx.init(params)
    got = shard(params)
    state = tx.init(got)
    assert kinds(state) == {"pinned_host"}
    assert state[0].mu["w"].sharding.spec == PartitionSpec("x", None)
    if placed:
        state = shard(state, memory_kind="pinned_host")
    for grads in gradients:
        want, want_state = step(want, want_state, grads)
        got, state = step(got, state, shard(grads))
        assert kinds(state) == {"pinned_host"}
    assert_same((got, state), (want, want_state))
    assert not state[0].mu["w"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("budget", "on_device"),
    [(0, set()), (4, {"small"}), (8191, {"small"}), (8196, {"small", "large"})],
)
def test_the_largest_arrays_go_to_the_host_first(budget, on_device):
    """The momenta have 4 and 8192 bytes."""
    tx = paged(optax.trace(0.9), device_budget=budget)
    params = {"small": jnp.ones(1), "large": jnp.ones((32, 64))}
    state = tx.init(params)
    for _ in range(2):
        places = {k: x.sharding.memory_kind for k, x in state.trace.items()}
        assert {k for k, kind in places.items() if kind == "device"} == on_device
        _, state = jax.jit(tx.update)(params, state, params)


def test_a_budget_changes_no_number():
    params, gradients = params_and_gradients()
    want = jaxbnb.adamw8bit(1e-2)
    tx = jaxbnb.optim.paged(want, device_budget=5000)
    state, want_state = tx.init(params), want.init(params)
    for g in gradients:
        got, state = jax.jit(tx.update)(g, state, params)
        expected, want_state = jax.jit(want.update)(g, want_state, params)
        assert_same(got, expected)


def test_a_negative_budget():
    with pytest.raises(ValueError, match="device_budget must be at least 0 bytes"):
        jaxbnb.optim.paged(optax.adam(1e-3), device_budget=-1)


def test_a_fused_step_of_paged_state():
    params, gradients = params_and_gradients()
    tx = jaxbnb.paged_adamw8bit(1e-2)
    plain = jaxbnb.adamw8bit(1e-2)
    step = jax.jit(jaxbnb.optim.fused_step(tx), donate_argnums=(1, 2))
    want_step = jax.jit(jaxbnb.optim.fused_step(plain))
    got, state = jax.tree.map(jnp.copy, params), tx.init(params)
    want, want_state = params, plain.init(params)
    for g in gradients:
        got, state = step(g, state, got)
        want, want_state = want_step(g, want_state, want)
    assert_same(got, want)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("donated", [(0,), (1,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_anything_may_be_donated(donated):
    """Matched by shape and dtype, a parameter once got a moment's buffer: an abort."""
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(3)}
    tx = paged(optax.trace(0.9))

    @functools.partial(jax.jit, donate_argnums=donated)
    def step(state, params, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = step(state, params, jax.tree.map(jnp.ones_like, params))
    assert params["w"][0, 0] == 1 + 1 + 1.9
    assert kinds(state) == {"pinned_host"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_every_dtype_comes_back(dtype):
    """It does even for gradients of another dtype, and without parameters."""
    inner = optax.GradientTransformation(
        lambda params: jnp.full(3, 2.5).astype(dtype), lambda g, s, p=None: (g, s + s)
    )
    tx = paged(inner)
    state = tx.init(jnp.ones(3))
    assert state.dtype != dtype or dtype == "int32"
    _, state = tx.update(jnp.ones(3, jnp.bfloat16), state)
    state = unpage(tx, state, jnp.ones(3))
    assert state.dtype == dtype
    np.testing.assert_array_equal(
        state.astype(jnp.float32), 4 if dtype == "int32" else 5
    )


def test_unpage_of_what_is_not_paged():
    tx = optax.trace(0.9)
    with pytest.raises(ValueError, match="unpage needs a paged transformation"):
        unpage(tx, tx.init(jnp.ones(3)), jnp.ones(3))
