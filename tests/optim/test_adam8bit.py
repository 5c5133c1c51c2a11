"""adam8bit and adamw8bit: what they compute, alone and with parts of Optax and Flax.

tests/goldens compares every bit of their arithmetic with bitsandbytes, and
test_state.py tests the layout of their state.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
import jaxbnb_kernels
from jaxbnb.optim import _adam, scale_by_adam8bit
from jaxbnb_kernels.codebooks import DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit, xla

NO_QUANTIZED = {"min_quantized_size": 2**60}


def normal(shape, dtype=jnp.float32, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x, dtype)


def make_step(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, gradients):
    """Returns the parameters after each step, and the last state."""
    step, state, steps = make_step(tx), tx.init(params), []
    for grads in gradients:
        params, state = step(params, state, grads)
        steps.append(params)
    return steps, state


def gradients_for(params, steps):
    """Draws a new normal gradient for each step."""
    leaves, treedef = jax.tree.flatten(params)
    return [
        treedef.unflatten([normal(x.shape, x.dtype, seed=100 + t) for x in leaves])
        for t in range(steps)
    ]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- Against Optax.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        {"nesterov": True, "eps_root": 1e-6, "mask": {"w": True, "b": False}},
    ],
    ids=str,
)
def test_with_float32_moments_it_is_optax_adamw(options):
    """Takes 20 steps. Both form 1 - b2^t, about t / 1000 and under a root, in float32.
    Their powers are within a step or two of 2^-24 of each other.
    """
    params = {"w": normal((5, 7)), "b": normal((7,))}
    gradients = gradients_for(params, 20)
    ours = train(jaxbnb.adamw8bit(1e-2, **NO_QUANTIZED, **options), params, gradients)
    # optax.adamw raises a float to an int power.
    with jax.numpy_dtype_promotion("standard"):
        theirs = train(optax.adamw(1e-2, **options), params, gradients)
    b2, tolerance = options.get("b2", 0.999), 0.0
    for t, (got, want) in enumerate(zip(ours[0], theirs[0], strict=True), 1):
        # A step is at most 1e-2 (1 - b1) / sqrt(1 - b2). Each has an error of b2^t,
        # eight roundings, and one more of a parameter below 4.
        tolerance += 0.032 * (2**-24 / (1 - b2**t) + 8 * 2**-24) + 4 * 2**-24
        for name in params:
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=tolerance)
    assert tolerance < 1e-4 * 1e-2 * 20


def test_adam8bit_is_adamw8bit_without_decay():
    params = normal((8, 512))
    gradients = gradients_for(params, 2)
    adam = train(jaxbnb.adam8bit(1e-2), params, gradients)
    adamw = train(jaxbnb.adamw8bit(1e-2, weight_decay=0.0), params, gradients)
    np.testing.assert_allclose(adam[0][-1], adamw[0][-1], rtol=0, atol=2**-22)
    assert_same(adam[1][0], adamw[1][0])


def test_on_a_quadratic_it_follows_optax():
    """Takes 50 steps of at most 0.01 on 16,384 parabolas with curvatures 0.5 to 2.

    A useful bound does not exist, because a step may change a moment by less than half
    the distance between two levels. Measured: 1.63 steps apart (root mean square; 5.1
    at worst), 3 % of the longest path.
    """
    generator = np.random.default_rng(0)
    target = generator.standard_normal((64, 256)).astype(np.float32)
    curvature = generator.uniform(0.5, 2, target.shape).astype(np.float32)

    def descend(tx):
        @jax.jit
        def run(params):
            def body(carry, _):
                params, state = carry
                grads = curvature * (params - target)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            carry = (params, tx.init(params))
            return jax.lax.scan(body, carry, None, length=50)[0][0]

        return np.asarray(run(jnp.zeros(target.shape)))

    ours = descend(jaxbnb.adamw8bit(1e-2, weight_decay=1e-2))
    with jax.numpy_dtype_promotion("standard"):
        theirs = descend(optax.adamw(1e-2, weight_decay=1e-2))

    def loss(params):
        return np.mean(curvature * (params - target) ** 2)

    apart = np.abs(ours - theirs) / 1e-2
    assert np.sqrt(np.mean(apart**2)) < 1.8
    assert apart.max() < 6
    assert loss(ours) < 0.5 * loss(0.0)
    assert abs(loss(ours) / loss(theirs) - 1) < 0.01


def test_it_learns_two_spirals():
    """Trains an MLP with all of its state in 8 bits."""
    generator = np.random.default_rng(0)
    turn = generator.uniform(0.25, 1.0, 256) * 3 * np.pi
    arm = generator.integers(0, 2, 256)
    angle = turn + np.pi * arm
    points = (turn / 9)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points, arm = jnp.asarray(points, jnp.float32), jnp.asarray(arm, jnp.int32)
    params = {
        "w1": normal((2, 64)),
        "b1": jnp.zeros(64),
        "w2": normal((64, 64), scale=1 / 8),
        "w3": normal((64, 2), scale=1 / 8),
    }
    tx = jaxbnb.adamw8bit(2e-2, min_quantized_size=0, block_size=64)

    def loss(params):
        x = jax.nn.silu(points @ params["w1"] + params["b1"])
        logits = jax.nn.silu(x @ params["w2"]) @ params["w3"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, arm)
        return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=1) == arm)

    @jax.jit
    def learn(params):
        def body(carry, _):
            params, state = carry
            values, grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), values

        return jax.lax.scan(body, (params, tx.init(params)), None, length=300)[1]

    losses, accuracies = learn(params)
    assert losses[0] > 0.6
    assert losses[-1] < 0.05
    assert accuracies[-1] > 0.98


# --- Properties.


def test_zero_gradients_never_move_a_parameter():
    """They do not in a block of zeros, nor next to large values, nor after them."""
    params = normal((17, 300))
    moving = (jnp.arange(300) % 3 == 0) & (jnp.arange(17) != 5)[:, None]
    steps, state = train(
        jaxbnb.adam8bit(1e-2),
        params,
        [jnp.where(moving, 1e3 * g, 0.0) for g in gradients_for(params, 5)],
    )
    np.testing.assert_array_equal(steps[-1][~moving], params[~moving])
    assert np.all(steps[-1][moving] != params[moving])
    assert np.all(np.asarray(state[0].mu)[~moving] == 127)
    assert np.all(np.asarray(state[0].nu)[~moving] == 0)
    assert np.all(np.asarray(state[0].nu)[moving] > 0)


def test_a_step_is_bounded_whatever_the_gradients():
    """One element exceeds the others of its block by 10^12. Their second moments do not
    become zero divisors: a step stays within (1 - b1) / sqrt(1 - b2) rates.
    """
    scale = jnp.asarray(10.0 ** np.random.default_rng(3).uniform(-6, 6, (16, 256)))
    params = jnp.zeros((16, 256))
    gradients = [g * scale.astype(jnp.float32) for g in gradients_for(params, 10)]
    steps, state = train(jaxbnb.adam8bit(1.0), params, gradients)
    for before, after in zip([params, *steps], steps, strict=False):
        assert np.abs(after - before).max() <= 3.2
    assert np.all(np.asarray(state[0].nu) > 0)


def test_the_update_takes_the_moments_before_they_are_rounded():
    """The first update therefore equals float32's, to the bit."""
    params, grads = jnp.zeros((17, 300)), normal((17, 300))
    eight = make_step(jaxbnb.adam8bit(1.0))
    full = make_step(jaxbnb.adam8bit(1.0, **NO_QUANTIZED))
    got, _ = eight(params, jaxbnb.adam8bit(1.0).init(params), grads)
    want, _ = full(params, jaxbnb.adam8bit(1.0, **NO_QUANTIZED).init(params), grads)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        (np.nan, np.inf, -np.inf),
        (1e20, 1e30, -1e38),
    ],
    ids=["not finite", "square not finite"],
)
def test_a_bad_gradient_element_shows_in_its_own_update_only(values, quantized):
    tx = scale_by_adam8bit(min_quantized_size=0 if quantized else 2**60)
    update = jax.jit(tx.update)
    first, second, third = gradients_for(jnp.ones((3, 512)), 3)
    _, state = update(first, tx.init(first))
    rows, columns = np.arange(3), np.array([7, 300, 511])
    bad = jnp.zeros((3, 512), jnp.bool_).at[rows, columns].set(True)
    got, got_state = update(second.at[rows, columns].set(jnp.array(values)), state)
    want, want_state = update(jnp.where(bad, 0.0, second), state)
    np.testing.assert_array_equal(np.isnan(got), bad)
    np.testing.assert_array_equal(got[~bad], want[~bad])
    for leaf in jax.tree.leaves(got_state):
        assert np.all(np.isfinite(leaf))
    # State is as if that step had not happened, to the bit unless it is rounded anew.
    for name in ("mu", "nu"):
        moment, old = getattr(got_state, name), getattr(state, name)
        np.testing.assert_array_equal(moment[~bad], getattr(want_state, name)[~bad])
        if not quantized:
            np.testing.assert_array_equal(moment[bad], old[bad])
    assert np.all(np.isfinite(update(third, got_state)[0]))


def test_a_block_of_nothing_but_nan():
    tx = scale_by_adam8bit()
    grads = normal((2, 4096)).at[0, :256].set(np.nan)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_array_equal(np.isnan(updates), np.isnan(grads))
    assert state.mu_absmax[0, 0] == 0
    assert np.all(np.asarray(state.nu_absmax).reshape(-1)[1:] > 0)


def test_16_bit_gradients_are_computed_in_float32():
    """The update is rounded only once."""
    grads = {
        "bfloat16": normal((8, 512), jnp.bfloat16),
        "float16": normal((8, 512), jnp.float16),
        "small": normal((300,), jnp.bfloat16),
    }
    tx = scale_by_adam8bit()
    update = jax.jit(tx.update)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, state = update(grads, tx.init(grads))
    want, want_state = update(wide, tx.init(wide))
    for name, grad in grads.items():
        assert updates[name].dtype == grad.dtype
        np.testing.assert_array_equal(updates[name], want[name].astype(grad.dtype))
    assert_same(state, want_state)


def test_any_shape():
    """Every shape with an element and an axis is stored in 8 bits."""
    shapes = [(), (1,), (0,), (0, 300), (5, 0, 2), (4096, 1), (1001, 5)]
    params = {str(shape): normal(shape) for shape in shapes}
    gradients = gradients_for(params, 2)
    steps, _ = train(jaxbnb.adamw8bit(1e-2, min_quantized_size=0), params, gradients)
    want, _ = train(jaxbnb.adamw8bit(1e-2, **NO_QUANTIZED), params, gradients)
    for name, shape in zip(params, shapes, strict=True):
        assert steps[-1][name].shape == shape
        # The first step is exact; the second is off by what 8 bits are off, at the most
        # by a tenth of a step in a hundred.
        np.testing.assert_allclose(steps[0][name], want[0][name], rtol=0, atol=2**-22)
        apart = np.abs(np.asarray(steps[1][name]) - want[1][name])
        assert np.all(apart < 1e-2)
        assert apart.size == 0 or np.mean(apart > 1e-3, dtype=np.float64) < 0.05


# Larger than twice CHUNK, so a CPU loops over chunks.
LARGE = {
    "one axis, a remainder": (300_001,),
    "rows of one block, a remainder": (1030, 256),
    "a stack of ragged rows": (3, 347, 257),
}


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large_leaves_go_by_chunks(shape):
    """The state equals the specification's to the bit.

    The update does too, except for two divisions by the bias corrections. XLA may
    multiply by the reciprocal in the loop: 1.5 steps of float32 each, one of them under
    a root, and another step if the quotient changes its binade.
    """
    assert np.prod(shape) > xla.SMALL
    grads, blocks = normal(shape), absmax_shape(shape)
    tx = scale_by_adam8bit()
    rule = Rule(_adam._advance, _adam._adam_direction)

    @jax.jit
    def reference(grads, state):
        count = state.count + 1
        scalars = _adam._scalars(count, 0.9, 0.999, 1e-8, 0.0)
        moments = [
            Moment(state.mu, state.mu_absmax, True),
            Moment(state.nu, state.nu_absmax, False),
        ]
        updates, (mu, nu) = update_8bit(
            rule, scalars, grads, moments, implementation="reference"
        )
        return updates, type(state)(count, mu.codes, nu.codes, mu.absmax, nu.absmax)

    update = jax.jit(tx.update)
    state = expected = tx.init(grads)
    assert state.mu_absmax.shape == blocks
    # The native kernel does not loop in XLA.
    with jaxbnb_kernels.config.override(cpu="never"):
        assert "while" in update.lower(grads, tx.init(grads)).as_text()
        for scale in (1.0, -0.1):
            got, state = update(scale * grads, state)
            want, expected = reference(scale * grads, expected)
            assert_same(state, expected)
            np.testing.assert_allclose(got, want, rtol=4 * 2**-23)


# --- With parts of Optax.


@pytest.fixture(scope="module")
def problem():
    params = {"w": normal((8, 512)), "b": normal((300,))}
    return params, gradients_for(params, 3)


@pytest.fixture(scope="module")
def alone(problem):
    """Returns the parameters after each step of plain adamw8bit."""
    return train(jaxbnb.adamw8bit(1e-2), *problem)[0]


def assert_near(got, want, tolerance=2**-22):
    """Allows for XLA fusing products and sums differently in other programs."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want
    )


def test_chain(problem, alone):
    tx = optax.chain(optax.clip_by_global_norm(1e9), jaxbnb.adamw8bit(1e-2))
    assert_near(train(tx, *problem)[0], alone)


def test_masked(problem, alone):
    params, gradients = problem
    tx = optax.masked(jaxbnb.adamw8bit(1e-2), {"w": True, "b": False})
    steps, state = train(tx, params, gradients)
    assert_near(steps[-1]["w"], alone[-1]["w"])
    # Masked gradients pass through.
    assert_near(steps[-1]["b"], params["b"] + sum(g["b"] for g in gradients), 2**-20)
    assert len(jax.tree.leaves(state)) == 5


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
def test_partition(problem, alone, partition):
    params, gradients = problem
    tx = partition(
        {"8bit": jaxbnb.adamw8bit(1e-2), "sgd": optax.sgd(0.1)},
        {"w": "8bit", "b": "sgd"},
    )
    steps, _ = train(tx, params, gradients)
    assert_near(steps[-1]["w"], alone[-1]["w"])
    want = params["b"] - 0.1 * sum(g["b"] for g in gradients)
    assert_near(steps[-1]["b"], want, 2**-20)


def test_decay_of_some(problem):
    params, _ = problem
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = jaxbnb.adamw8bit(
        1e-2, weight_decay=0.1, mask=lambda p: {"w": True, "b": False}
    )
    steps, _ = train(tx, params, [zeros])
    np.testing.assert_allclose(steps[0]["w"], params["w"] * (1 - 1e-3), rtol=2**-22)
    np.testing.assert_array_equal(steps[0]["b"], params["b"])


def test_schedules(problem):
    """The rate of step t is the schedule at t - 1, as in Optax."""
    params, _ = problem
    tx = jaxbnb.adam8bit(lambda count: jnp.where(count < 1, 1.0, 0.0))
    ones = jax.tree.map(jnp.ones_like, params)
    first, second = train(tx, params, [ones, ones])[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a != b)), first, params))
    assert_same(second, first)


def test_inject_hyperparams(problem, alone):
    params, gradients = problem
    tx = optax.inject_hyperparams(jaxbnb.adamw8bit)(
        learning_rate=lambda count: jnp.float32(1e-2)
    )
    steps, state = train(tx, params, gradients)
    # 1 - b2 is float32 instead of double: off by 3e-5, or half as much of a step.
    assert_near(steps, alone, 3 * 1e-2 * 3e-5)
    assert {"b1", "b2", "eps", "learning_rate"} <= set(state.hyperparams)
    state.hyperparams["b1"] = jnp.float32(0.0)
    _, state = jax.jit(tx.update)(gradients[0], state, params)
    assert state.hyperparams["b1"] == 0.0
    np.testing.assert_array_equal(state.inner_state[0].mu["b"], gradients[0]["b"])


def test_multi_steps(problem):
    params, gradients = problem
    tx = optax.MultiSteps(jaxbnb.adamw8bit(1e-2), every_k_schedule=2)
    step, state = make_step(tx), tx.init(params)
    # Optax divides by an int.
    with jax.numpy_dtype_promotion("standard"):
        first, state = step(params, state, gradients[0])
        second, state = step(first, state, gradients[1])
    assert_same(first, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients[:2])
    want = train(jaxbnb.adamw8bit(1e-2), params, [mean])[0][0]
    assert_near(second, want)
    assert step._cache_size() == 1


def test_apply_if_finite(problem):
    params, gradients = problem
    tx = optax.apply_if_finite(jaxbnb.adamw8bit(1e-2), max_consecutive_errors=3)
    step = make_step(tx)
    params, state = step(params, tx.init(params), gradients[0])
    bad = {**gradients[1], "w": gradients[1]["w"].at[3, 7].set(np.nan)}
    same, skipped = step(params, state, bad)
    assert_same(same, params)
    assert_same(skipped.inner_state, state.inner_state)
    assert skipped.total_notfinite == 1
    after, _ = step(same, skipped, gradients[1])
    assert_same(after, step(params, state, gradients[1])[0])


# --- JAX's transforms.


def test_vmap_is_an_ensemble():
    """Each member has its own state."""
    params = normal((3, 8, 512))
    gradients = gradients_for(params, 2)
    tx = jaxbnb.adamw8bit(1e-2)

    @jax.jit
    @jax.vmap
    def run(params, *gradients):
        state = tx.init(params)
        for grads in gradients:
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    together, state = run(params, *gradients)
    assert state[0].mu_absmax.shape == (3, 8, 2)
    alone, _ = train(tx, params[1], [g[1] for g in gradients])
    assert_near(together[1], alone[-1])


def test_scan_over_steps(problem, alone):
    params, gradients = problem
    tx = jaxbnb.adamw8bit(1e-2)

    @jax.jit
    def run(params, gradients):
        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), gradients)[0]

    params, state = run(params, jax.tree.map(lambda *g: jnp.stack(g), *gradients))
    assert_near(params, alone[-1])
    assert state[0].count == 3


@pytest.mark.parametrize("shape", [(32, 1024), (512, 1024)], ids=["whole", "by chunks"])
def test_sharded_over_devices(shape):
    """One spec shards parameter, codes and absmax, without changing a number."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = NamedSharding(mesh, PartitionSpec("x", "y"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tx = jaxbnb.adamw8bit(1e-2)
    params = normal(shape)
    gradients = gradients_for(params, 2)
    want = train(tx, params, gradients)

    def shard(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, spec if x.ndim else everywhere), tree
        )

    step = make_step(tx)
    got, state = shard(params), shard(tx.init(params))
    for grads in gradients:
        got, state = step(got, state, shard(grads))
    assert_same((got, state), (want[0][-1], want[1]))
    assert got.sharding.is_equivalent_to(spec, 2)
    if shape == (32, 1024):
        for leaf in jax.tree.leaves(state)[1:]:
            assert leaf.sharding.is_equivalent_to(spec, 2)
        assert step._cache_size() == 1


# --- With parts of Flax.


def test_nnx_optimizer():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jaxbnb.adamw8bit(1e-2), wrt=nnx.Param)
    x = normal((8, 64))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]
    assert state["mu"]["kernel"].dtype == jnp.uint8
    assert state["mu"]["bias"].dtype == jnp.float32
    assert state["nu_absmax"]["kernel"].shape == (16, 1)
    assert state["count"] == 3


def test_linen_train_state():
    model = nn.Dense(64)
    x = normal((8, 64))
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=jaxbnb.adamw8bit(1e-2),
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(3):
        state, value = step(state)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]
    assert state.step == 3
    assert state.opt_state[0].nu["kernel"].dtype == jnp.uint8


def test_the_smallest_levels_that_positive_second_moments_get():
    """They get the lowest level above zero, however small they are."""
    tx = scale_by_adam8bit()
    grads = jnp.ones((1, 4096)).at[0, ::2].set(1e-9).at[0, 1::4].set(0.0)
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    codes = np.asarray(state.nu)[0]
    assert set(codes[::2].tolist()) == {1}
    assert set(codes[1::4].tolist()) == {0}
    assert set(codes[3::4].tolist()) == {255}
    assert DYNAMIC8_UNSIGNED[1] > 3e-7
