"""apply_updates_stochastic and stochastic_rounding: unbiased, always to a neighbour.

A rounding takes its noise as an argument, so its mean over all noise is exact, not an
estimate.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.optim import (
    _stochastic,
    apply_updates_stochastic,
    decode_state,
    fused_step,
    stochastic_rounding,
)

# Mantissa bits; exponent of the smallest normal value; the rounding; number of random
# bits that decide between the neighbours of a normal value.
FORMATS = {
    jnp.bfloat16: (7, -126, _stochastic._to_bfloat16, 16),
    jnp.float16: (10, -14, _stochastic._to_float16, 13),
}
BOTH = pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: jnp.dtype(d).name)
KEY = jax.random.key(0)


def spacing(x, dtype):
    """Returns the spacing around float64 values, in each one's half-open binade."""
    bits, smallest, *_ = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(x))
    return 2.0 ** (np.maximum(exponent - 1, smallest) - bits)


def all_noise(bits):
    """Returns every value of the upper bits, once."""
    return jnp.arange(2**bits, dtype=jnp.uint32) << (32 - bits)


def float64(x):
    return np.asarray(x).astype(np.float64)


# --- One rounding.


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "value",
    [
        0.7001,
        1.0001,
        2 - 2.0**-20,  # between two binades
        1000.3,
        3e-4,
        2.0**-14 + 2.0**-30,  # next to the smallest normal float16
        2.0**-14 - 2.0**-30,
        5 * 2.0**-24 + 3 * 2.0**-37,  # a subnormal float16
        2.0**-26,  # below all subnormals
        0.0,
    ],
)
def test_the_mean_over_all_noise_is_the_value(value, sign, dtype):
    """It is exact: chances are multiples of 2^-16 or 2^-13, the number of noises."""
    *_, rounding, bits = FORMATS[dtype]
    x = np.float64(np.float32(sign * value))
    if abs(x) < 2.0**-14 and dtype == jnp.float16:
        x = np.round(x * 2.0**37) * 2.0**-37
    noise = all_noise(bits)
    results = float64(rounding(jnp.full(noise.shape, x, jnp.float32), noise))
    assert np.mean(results) == x
    below = np.floor(x / spacing(x, dtype)) * spacing(x, dtype)
    assert set(results) <= {below, below + spacing(x, dtype)}


def test_the_mean_of_subnormal_bfloat16():
    """The test uses bits, because arithmetic would flush them to zero."""
    noise = all_noise(16)
    x = jax.lax.bitcast_convert_type(
        jnp.full(2**16, 0x00031234, jnp.uint32), jnp.float32
    )
    codes = np.asarray(_stochastic._to_bfloat16(x, noise)).view(np.uint16)
    assert np.mean(codes.astype(np.float64)) == 0x31234 / 2**16
    assert set(codes) == {3, 4}


@BOTH
@hypothesis.given(data=st.data())
def test_every_value_goes_to_a_neighbour_and_stays_if_it_is_one(data, dtype):
    *_, rounding, _ = FORMATS[dtype]
    largest = float(jnp.finfo(dtype).max)
    values = st.floats(-largest, largest, width=32, allow_subnormal=False)
    x = np.float32(data.draw(st.lists(values, min_size=8, max_size=8)))
    noise = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8))
    noise = jnp.asarray(np.uint32(noise))
    got = rounding(jnp.asarray(x), noise)
    apart = np.abs(float64(got) - x)
    # The test above covers subnormal bfloat16; float64 does not flush any.
    assert np.all(apart < spacing(np.float64(x), dtype))
    np.testing.assert_array_equal(np.signbit(got.astype(jnp.float32)), np.signbit(x))
    again = rounding(got.astype(jnp.float32), noise[::-1])
    np.testing.assert_array_equal(again, got)


# --- A step.


@BOTH
@pytest.mark.parametrize("value", [0.7, -0.5004, 0.97])
def test_100_000_draws(value, dtype):
    """The spacing around the sum is at most 2^-8. One draw deviates by at most half of
    it, and the mean of 10^5 by a standard deviation of 6.2e-6. The test allows four.
    """
    p = jnp.full(100_000, value, dtype)
    u = jnp.full(100_000, 1.2345e-4, jnp.float32)
    x = np.float64(p[0].astype(jnp.float32) + u[0])
    step = spacing(x, dtype)
    chance = x / step - np.floor(x / step)
    sigma = step * np.sqrt(chance * (1 - chance) / 1e5)
    assert 0 < 4 * sigma < 3e-5
    new = apply_updates_stochastic(p, u, KEY)
    assert new.dtype == dtype
    assert abs(np.mean(float64(new)) - x) < 4 * sigma
    # Both neighbours occur, each about as often as it should.
    assert len(set(float64(new))) == 2


def test_small_updates_add_up():
    """Adds 1e-4 to a bfloat16 one 1000 times. Its spacing is 2^-7: nearest stays at 1.

    A step goes up with a chance of 0.0128, a standard deviation of 8.8e-4. 1000 steps,
    averaged over 4096 parameters, have 4.4e-4. The test allows five.
    """
    start = jnp.ones(4096, jnp.bfloat16)

    def add_up(apply):
        def body(p, key):
            return apply(p, jnp.full(4096, 1e-4, jnp.bfloat16), key), None

        keys = jax.random.split(KEY, 1000)
        return jax.jit(lambda p: jax.lax.scan(body, p, keys)[0])(start)

    nearest = add_up(lambda p, u, key: optax.apply_updates(p, u))
    np.testing.assert_array_equal(nearest, start)
    size = np.float64(jnp.bfloat16(1e-4))
    chance = size * 2**7
    sigma = 2.0**-7 * np.sqrt(1000 * chance * (1 - chance) / 4096)
    moved = np.mean(float64(add_up(apply_updates_stochastic))) - 1
    assert abs(moved - 1000 * size) < 5 * sigma < 0.1 * 1000 * size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_other_dtypes_are_exactly_optax(dtype):
    generator = np.random.default_rng(0)
    p, u = (jnp.asarray(100 * generator.standard_normal(1000), dtype) for _ in range(2))
    got = apply_updates_stochastic({"p": p}, {"p": u}, KEY)
    want = optax.apply_updates({"p": p}, {"p": u})
    np.testing.assert_array_equal(got["p"], want["p"])
    assert got["p"].dtype == dtype


def test_the_sum_is_float32():
    """2^-12 does not change a bfloat16 one, but it changes the odds."""
    p = jnp.ones(2**17, jnp.bfloat16)
    for u in (2.0**-12, -(2.0**-12)):
        got = apply_updates_stochastic(p, jnp.full(p.shape, u, jnp.float32), KEY)
        # The chance is a 32nd upwards. Below 1, the spacing halves: a 16th downwards.
        chance = 2.0**-5 if u > 0 else 2.0**-4
        sigma = np.sqrt(chance * (1 - chance) / 2**17)
        assert abs(np.mean(got != 1) - chance) < 5 * sigma


def test_each_leaf_and_each_key_has_its_own_noise():
    p = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1000, jnp.bfloat16)}
    u = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8, jnp.float32), p)
    got = apply_updates_stochastic(p, u, KEY)
    same = apply_updates_stochastic(p, u, KEY)
    jax.tree.map(np.testing.assert_array_equal, got, same)
    other = apply_updates_stochastic(p, u, jax.random.key(1))
    # Two fair coins agree half of the time; five sigma are 79 of 1000.
    for first, second in ((got["a"], got["b"]), (got["a"], other["a"])):
        assert 420 < np.sum(first == second) < 580


# --- At the ends of the range.


@BOTH
def test_what_is_not_finite_stays(dtype):
    p = jnp.asarray([np.nan, np.inf, -np.inf, 1, 1, 1, np.inf], dtype)
    u = jnp.asarray([0, 1, 1, np.nan, np.inf, -np.inf, -np.inf], jnp.float32)
    want = [np.nan, np.inf, -np.inf, np.nan, np.inf, -np.inf, np.nan]
    got = apply_updates_stochastic(p, u, KEY)
    np.testing.assert_array_equal(float64(got), want)


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_is_left_as_rounding_to_nearest_leaves_it(dtype, sign):
    """It stays, and so does anything within half a step; beyond that is infinity."""
    largest = float(jnp.finfo(dtype).max)
    half = spacing(largest, dtype) / 2
    p = jnp.full(10_000, sign * largest, dtype)
    for share, finite in ((0.0, True), (0.9, True), (1.1, False), (4.0, False)):
        u = jnp.full(p.shape, sign * share * half, jnp.float32)
        want = sign * (largest if finite else np.inf)
        got = apply_updates_stochastic(p, u, KEY)
        np.testing.assert_array_equal(float64(got), np.full(p.shape, want))


@BOTH
def test_just_below_the_largest_value_nothing_becomes_infinite(dtype):
    *_, rounding, bits = FORMATS[dtype]
    largest = float(jnp.finfo(dtype).max)
    x = np.nextafter(np.float32(largest), np.float32(0))
    results = float64(rounding(jnp.full(2**bits, x), all_noise(bits)))
    assert set(results) == {largest, largest - spacing(largest, dtype)}


def test_a_flushed_sum_is_zero_or_right():
    """A device may flush float32 subnormals to zero, but must not change others."""
    tiny = jnp.asarray([3e-39, -3e-39], jnp.bfloat16)
    got = apply_updates_stochastic(tiny, jnp.zeros(2), KEY)
    assert np.all((float64(got) == float64(tiny)) | (float64(got) == 0))


# --- Trees, keys, transforms.


def test_none_is_treated_as_optax_does():
    one = jnp.ones(3, jnp.bfloat16)
    got = apply_updates_stochastic({"a": None, "b": one}, {"a": None, "b": one}, KEY)
    assert got["a"] is None
    np.testing.assert_array_equal(got["b"], 2 * np.ones(3))
    got = apply_updates_stochastic([None], [one], KEY)
    assert got == optax.apply_updates([None], [one]) == [None]
    for apply in (
        optax.apply_updates,
        lambda p, u: apply_updates_stochastic(p, u, KEY),
    ):
        with pytest.raises(TypeError):
            apply({"a": one}, {"a": None})


def test_a_tree_without_leaves():
    assert apply_updates_stochastic({}, {}, KEY) == {}


def test_nothing_narrower():
    p = jnp.ones(3, jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="got float8_e4m3fn"):
        apply_updates_stochastic(p, p, KEY)


def test_keys_of_either_kind():
    p, u = jnp.ones(100, jnp.bfloat16), jnp.full(100, 2.0**-8)
    typed = apply_updates_stochastic(p, u, jax.random.key(3))
    raw = apply_updates_stochastic(p, u, jax.random.PRNGKey(3))
    np.testing.assert_array_equal(typed, raw)


def test_nnx_state():
    """The mean of 64 x 64, spacing 2^-9, deviates by 2^-10 / 64. Allows five."""
    model = nnx.Linear(64, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    old = float64(model.kernel[...])
    assert np.abs(old).max() < 0.49
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
    new = apply_updates_stochastic(params, updates, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    nnx.update(model, new)
    assert model.kernel[...].dtype == jnp.bfloat16
    moved = float64(model.kernel[...]) - old
    assert abs(np.mean(moved) - 1e-3) < 5 * 2.0**-10 / 64


@BOTH
def test_compiled_and_donated(dtype):
    p, u = jnp.linspace(-2, 2, 4096).astype(dtype), jnp.full(4096, 1e-4)
    want = apply_updates_stochastic(p, u, KEY)
    donated = jnp.copy(p)
    step = jax.jit(apply_updates_stochastic, donate_argnums=0)
    np.testing.assert_array_equal(step(donated, u, KEY), want)
    assert donated.is_deleted()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_it_is_the_same_and_needs_no_communication(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    p = jnp.linspace(-2, 2, 4096).reshape(64, 64).astype(jnp.bfloat16)
    u = jnp.full((64, 64), 1e-4)
    want = apply_updates_stochastic(p, u, KEY)
    with jax.set_mesh(mesh):
        args = jax.device_put(p, sharding), jax.device_put(u, sharding), KEY
        compiled = jax.jit(apply_updates_stochastic).lower(*args).compile()
        got = compiled(*args)
    np.testing.assert_array_equal(got, want)
    assert got.sharding.is_equivalent_to(sharding, 2)
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in compiled.as_text()


# --- The random bits.


def test_bits_are_uniform_and_independent():
    """Bits of 2^22 elements: themselves, next to each other, and with another key.

    A bit that is set half of the time deviates by 2^-12 of the mean of 2^22; the test
    allows six, for 3 x 32 x 32 pairs of bits. Chi-square of the upper byte, with 255
    degrees of freedom, deviates by 22.6 from 255, and the test allows six.
    """
    noise = np.asarray(_stochastic._noise(KEY, (2048, 2048)))
    other = np.asarray(_stochastic._noise(jax.random.key(1), (2048, 2048)))
    counts = np.bincount((noise >> 24).ravel(), minlength=256)
    expected = noise.size / 256
    assert abs(np.sum((counts - expected) ** 2) / expected - 255) < 6 * 22.6
    bits = [(noise >> k & 1).astype(np.int8) * 2 - 1 for k in range(32)]
    pairs = {
        "rows": lambda x: np.roll(x, 1, axis=0),
        "columns": lambda x: np.roll(x, 1, axis=1),
    }
    for move in pairs.values():
        for k in (0, 15, 16, 24, 31):
            for j in (0, 16, 31):
                mean = np.mean(bits[k] * move(bits[j]), dtype=np.float64)
                assert abs(mean) < 6 * 2.0**-11
    for k in range(32):
        mean = np.mean(bits[k], dtype=np.float64)
        assert abs(mean) < 6 * 2.0**-11
        twin = (other >> k & 1).astype(np.int8) * 2 - 1
        assert abs(np.mean(bits[k] * twin, dtype=np.float64)) < 6 * 2.0**-11


# --- A transformation that rounds.


def parameters():
    """A matrix with an 8-bit state, a small vector, and one of 32 bits."""
    keys = jax.random.split(KEY, 3)
    return {
        "w": jax.random.normal(keys[0], (64, 128)).astype(jnp.bfloat16),
        "b": jax.random.normal(keys[1], (7,)).astype(jnp.float16),
        "norm": jax.random.normal(keys[2], (64, 64)),
    }


GRADIENTS = [
    jax.tree.map(lambda p, size=size: size * p, parameters())
    for size in (0.1, 0.2, 0.3)
]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


OPTIMIZERS = {
    "adamw8bit": lambda: jaxbnb.adamw8bit(1e-3, weight_decay=0.0),
    "lion8bit": lambda: jaxbnb.lion8bit(1e-4, weight_decay=0.0),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), jaxbnb.adam8bit(1e-3)),
    "sgd": lambda: optax.sgd(1e-3),
}


@pytest.fixture
def mixed_dtypes():
    """Allows what Optax does with parameters of several dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("mixed_dtypes")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_updates_are_those_of_the_optimizer(name):
    """Rounded at random, with the key of the seed and of the step."""
    inner = OPTIMIZERS[name]()
    tx = stochastic_rounding(inner, seed=3)

    @jax.jit
    def by_hand(grads, state, params, key):
        updates, state = inner.update(grads, state, params)
        return apply_updates_stochastic(params, updates, key), state

    params = want = parameters()
    state, inner_state = tx.init(params), inner.init(params)
    step = jax.jit(fused_step(tx))
    for number, grads in enumerate(GRADIENTS):
        params, state = step(grads, state, params)
        key = jax.random.fold_in(jax.random.key(3), number)
        want, inner_state = by_hand(grads, inner_state, want, key)
    assert_same(params, want)
    assert_same(state.inner_state, inner_state)
    assert state.count == 3
    other = fused_step(stochastic_rounding(inner, seed=4))
    again, _ = jax.jit(other)(grads, state, params)
    mine, _ = step(grads, state, params)
    assert np.any(again["w"] != mine["w"])
    assert_same(again["norm"], mine["norm"])


@pytest.mark.usefixtures("mixed_dtypes")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_adds_its_updates_without_rounding_again(name):
    tx = stochastic_rounding(OPTIMIZERS[name]())
    params, state = parameters(), tx.init(parameters())

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    got, _ = step(GRADIENTS[0], state, params)
    want, _ = jax.jit(fused_step(tx))(GRADIENTS[0], state, params)
    assert_same(got, want)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)


def test_small_updates_of_an_optimizer_add_up():
    """200 steps of Adam of 1e-4 from 1, to 0.98: to nearest, all of them are lost.

    Below 1, the spacing is 2^-8, so a step goes down with a chance of 0.0256. The mean
    of 64 x 128 parameters deviates by 2^-8 sqrt(200 x 0.0256 / 8192), and the test
    allows five. Updates are bfloat16, rounded up to three times: 3 x 2^-9 of 0.02.
    """
    tx = jaxbnb.adam8bit(1e-4)
    ones = jnp.ones((64, 128), jnp.bfloat16)

    def train(tx):
        def step(carry, _):
            params, state = fused_step(tx)(ones, carry[1], carry[0])
            return (params, state), None

        return jax.lax.scan(step, (ones, tx.init(ones)), length=200)[0][0]

    np.testing.assert_array_equal(jax.jit(lambda: train(tx))(), ones)
    moved = float64(jax.jit(lambda: train(stochastic_rounding(tx)))()).mean() - 1
    sigma = 2.0**-8 * np.sqrt(200 * 0.0256 / ones.size)
    assert abs(moved + 0.02) < 5 * sigma + 3 * 2.0**-9 * 0.02 < 0.1 * 0.02


def test_a_step_that_is_not_taken_moves_nothing():
    tx = stochastic_rounding(jaxbnb.adamw8bit(1e-3))
    params, state = parameters(), tx.init(parameters())
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    step = jax.jit(fused_step(tx))
    assert_same(step(bad, state, params, jnp.bool_(False)), (params, state))
    want = step(GRADIENTS[0], state, params)
    assert_same(step(GRADIENTS[0], state, params, jnp.bool_(True)), want)


def test_paged_state_stays_on_the_host():
    """However they are nested, and to the bit."""
    params, plain = parameters(), stochastic_rounding(jaxbnb.adamw8bit(1e-3), seed=1)
    want, want_state = params, plain.init(params)
    tx = stochastic_rounding(jaxbnb.paged_adamw8bit(1e-3), seed=1)
    state = tx.init(params)
    for grads in GRADIENTS:
        params, state = jax.jit(fused_step(tx))(grads, state, params, jnp.bool_(True))
        want, want_state = jax.jit(fused_step(plain))(grads, want_state, want)
    assert_same(params, want)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
    assert_same(jaxbnb.optim.unpage(tx, state, params), want_state)


def test_its_state_is_decoded():
    params, inner = parameters(), jaxbnb.adamw8bit(1e-3)
    tx = stochastic_rounding(inner)
    _, state = fused_step(tx)(GRADIENTS[0], tx.init(params), params)
    got = decode_state(tx, state, params)
    assert_same(got.inner_state, decode_state(inner, state.inner_state, params))
    assert got.count == 1


@pytest.mark.usefixtures("mixed_dtypes")
def test_nnx_optimizer_rounds():
    """A step of 1e-4 from 1, of 64 x 64: 5 sigma of its mean are 7e-5 or less."""
    model = nnx.Linear(64, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.ones_like(model.kernel[...])
    tx = stochastic_rounding(optax.sgd(1e-4))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(3):
        optimizer.update(model, grads)
    moved = float64(model.kernel[...]).mean() - 1
    sigma = 2.0**-8 * np.sqrt(3 * 0.0256 / 4096)
    assert abs(moved + 3e-4) < 5 * sigma + 2.0**-9 * 3e-4 < 1e-4
