"""jaxbnb's optimizers against bitsandbytes' over 200 steps, never re-synced.

The tests compare rows 0 to 6. In the last row bitsandbytes stores small second moments
as zero and jumps, and jaxbnb does not. bitsandbytes stores the squares of RMSprop and
Adagrad with signed codes. Their first step is the same, and later ones are compared
with the definition on unsigned codes.
"""

import functools
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb

HERE = pathlib.Path(__file__).parent
GOLDEN = types.SimpleNamespace(**runpy.run_path(str(HERE / "test_trajectories.py")))
ROWS = slice(0, 7)


def later(schedule):
    """Shifts a schedule: bitsandbytes counts steps from 1, Optax from 0."""
    return lambda count: schedule(count + 1)


def make(name):
    a = GOLDEN.ARGUMENTS[name]
    decay = {"weight_decay": a["decay"]}
    if name == "adamw":
        return jaxbnb.adamw8bit(a["lr"], *a["betas"], **decay)
    if name == "lion":
        return jaxbnb.lion8bit(a["lr"], *a["betas"], **decay)
    if name == "sgd":
        # The decay is coupled: it is part of the gradient.
        coupled = optax.add_decayed_weights(a["decay"])
        return optax.chain(coupled, jaxbnb.sgd8bit(a["lr"], a["momentum"]))
    if name == "ademamix":
        b1, b2, b3 = a["betas"]
        return jaxbnb.ademamix8bit(a["lr"], b1, b2, b3, a["alpha"], **decay)
    if name == "ademamix_scheduled":
        b1, b2, b3 = a["betas"]
        b3 = later(jaxbnb.optim.ademamix_b3_schedule(b1, b3, a["t_beta3"]))
        alpha = later(optax.linear_schedule(0.0, a["alpha"], a["t_alpha"]))
        return jaxbnb.ademamix8bit(a["lr"], b1, b2, b3, alpha, **decay)
    if name == "rmsprop":
        return jaxbnb.rmsprop8bit(a["lr"], a["alpha"], eps_in_sqrt=False)
    return jaxbnb.adagrad8bit(a["lr"], initial_accumulator_value=0.0, eps=1e-20)


@functools.cache
def trajectory(name):
    """Returns the parameter after 0, 1, 2, ... 200 steps, and the last state."""
    tx = make(name)
    params = jnp.asarray(GOLDEN.GRADIENTS.initial(GOLDEN.SHAPE))
    gradients = [GOLDEN.GRADIENTS.gradient(t, GOLDEN.SHAPE) for t in range(1, 201)]

    @jax.jit
    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), after = jax.lax.scan(
        step, (params, tx.init(params)), jnp.stack(gradients)
    )
    return np.stack([params, *after]).astype(np.float64), state


def beyond(name, t, expected):
    params, _ = trajectory(name)
    apart = np.abs(params[t][ROWS, GOLDEN.COLUMNS] - expected)
    allowed = GOLDEN.tolerance(name, params, t)[ROWS, GOLDEN.COLUMNS]
    return apart[apart > allowed]


@pytest.mark.parametrize("t", GOLDEN.STORED)
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "ademamix"])
def test_parameters(name, t):
    """They agree within rounding, except for a few elements with different codes."""
    apart = beyond(name, t, GOLDEN.TRAJECTORIES[f"{name}_{t}"][ROWS])
    assert apart.size <= (0 if t <= 2 else 10)
    # A first moment lasts ten steps.
    assert apart.max(initial=0) <= 10 * GOLDEN.ARGUMENTS[name]["lr"]


@pytest.mark.parametrize("t", GOLDEN.STORED)
def test_schedules_of_ademamix(t):
    """A schedule's 1 - b3 is off by half a step of 1: 3e-4 of itself at 0.9999."""
    name = "ademamix_scheduled"
    apart = beyond(name, t, GOLDEN.TRAJECTORIES[f"{name}_{t}"][ROWS])
    assert apart.size <= 20
    assert apart.max(initial=0) <= 10 * GOLDEN.ARGUMENTS[name]["lr"]


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_the_first_step_of_signed_squares(name):
    """Adagrad's eps of 1e-10 is outside the root in bitsandbytes."""
    rows = slice(0, 3)
    apart = np.abs(
        trajectory(name)[0][1][rows, GOLDEN.COLUMNS]
        - GOLDEN.TRAJECTORIES[f"{name}_1"][rows]
    )
    allowed = GOLDEN.tolerance(name, trajectory(name)[0], 1)[rows, GOLDEN.COLUMNS]
    # 1e-10 next to the smallest root, 2.5e-5, is less than 1e-5 of a step.
    assert np.all(apart <= allowed + 1e-5 * GOLDEN.ARGUMENTS[name]["lr"])


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_squares_are_nearer_to_32_bits_than_with_signed_codes(name):
    """After 200 steps, our root mean square distance is less than half of theirs."""
    a = GOLDEN.ARGUMENTS[name]
    exact = GOLDEN.GRADIENTS.initial(GOLDEN.SHAPE).astype(np.float64)
    moments = [np.zeros(GOLDEN.SHAPE)]
    for t in range(1, 201):
        gradient = GOLDEN.GRADIENTS.gradient(t, GOLDEN.SHAPE).astype(np.float64)
        exact, moments = GOLDEN.step(name, a, t, gradient, exact, moments)
    exact = exact[ROWS, GOLDEN.COLUMNS]
    theirs = GOLDEN.TRAJECTORIES[f"{name}_200"][ROWS] - exact
    ours = trajectory(name)[0][200][ROWS, GOLDEN.COLUMNS] - exact
    assert np.sqrt(np.mean(ours**2)) < 0.5 * np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("adamw", ["mu", "nu"]),
        ("lion", ["mu"]),
        ("ademamix", ["m1", "m2", "nu"]),
    ],
)
def test_state(name, fields):
    """Codes and absmax agree after 200 steps."""
    _, state = trajectory(name)
    stored = GOLDEN.state(name, 200)
    for field, (codes, absmax) in zip(fields, stored, strict=True):
        ours = np.asarray(getattr(state[0], field)).astype(int)[ROWS]
        differ = ours != codes.reshape(GOLDEN.SHAPE).astype(int)[ROWS]
        assert differ.sum() <= 10
        got = np.asarray(getattr(state[0], f"{field}_absmax"))[ROWS]
        want = absmax.reshape(8, 2)[ROWS]
        # Each step rounds twice, by up to half a step of float32.
        np.testing.assert_allclose(got, want, rtol=2 * 200 * 2**-24)
