"""Every optimizer against Optax: a step, a descent, on a mesh, from a file."""

import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbnb.optim import decode_state
from jaxbnb_kernels.codebooks import (
    DYNAMIC4_SIGNED,
    DYNAMIC4_UNSIGNED,
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
)

pytestmark = pytest.mark.matrix

T = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).parent / "optimizers.py"))
)
EPS = 2.0**-24


def every_optimizer(*, without=()):
    kept = {name: row for name, row in T.OPTIMIZERS.items() if name not in without}
    return pytest.mark.parametrize("row", kept.values(), ids=kept)


@pytest.fixture(autouse=True)
def as_optax_expects():
    """Allows the int32 promotions in Optax's schedules and bias corrections."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- A step.


def half_cell(codebook):
    """Returns the largest distance of values up to 1 from the nearest level."""
    levels = np.sort(codebook)
    to_ends = max(abs(levels[0] + 1) if levels[0] < 0 else 0.0, abs(levels[-1] - 1))
    return max(np.diff(levels).max() / 2, to_ends)


HALF_CELLS = {
    8: (half_cell(DYNAMIC8_SIGNED), half_cell(DYNAMIC8_UNSIGNED)),
    4: (half_cell(DYNAMIC4_SIGNED), half_cell(DYNAMIC4_UNSIGNED)),
    # fp8 has three bits of mantissa; its highest binade is 256 to 448.
    "fp8": (16 / 448, 16 / 448),
}


def block_absmax(x, block_size):
    """Returns, for each element, the largest magnitude in its block of whole rows."""
    rows = block_size // x.shape[1]
    starts = np.arange(0, len(x), rows)
    of_blocks = np.maximum.reduceat(np.abs(x).max(1), starts)
    return np.repeat(of_blocks, rows)[: len(x), None]


# optax.trace does not have dampening.
@every_optimizer(without=["sgd8bit dampening"])
def test_a_step_is_optax_on_the_decoded_state(row):
    """The update uses the moments before rounding, which costs half a cell."""
    tx, in_32_bits = row.make(), row.make(state_bits=32)
    _, params, state = T.last(tx, T.GRADIENTS[:2])
    updates, new = tx.update(T.GRADIENTS[2], state, params)
    decoded = decode_state(tx, state, params)
    want, want_state = in_32_bits.update(T.GRADIENTS[2], decoded, params)
    # The update has eight roundings, and its moments three per step. One more is in the
    # power b^t of 1 - b^t, which is t / 1000, and one in the sum with a parameter.
    share = (8 + 3 * 3 + 1000 / 3) * EPS
    rounding = share * T.largest(want) + 2 * EPS * T.largest(params)
    T.assert_near(updates, want, rounding)
    signed, unsigned = HALF_CELLS[row.state_bits]
    quantized = 0
    for got, want in zip(
        jax.tree.leaves(decode_state(tx, new, params)),
        jax.tree.leaves(want_state),
        strict=True,
    ):
        got, want = np.asarray(got), np.asarray(want)
        if want.size < 4096 or (got == want).all():
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * T.largest(want))
            continue
        quantized += 1
        part = unsigned if (want >= 0).all() else signed
        absmax = block_absmax(want, 128 if row.state_bits == 4 else 256)
        allowed = part * absmax
        # A moment has eight roundings (RMSProp's comes from updates), and three more.
        assert np.all(np.abs(got - want) <= allowed + (8 + 3) * EPS * absmax)
        # It is also close to the right value, so not simply zero.
        assert np.mean(np.abs(got - want) / allowed) < 0.5
    assert quantized >= 1


# --- Descent down a parabola and a valley, as in Optax's own tests.

# There are 384 parabolas with curvatures of 0.5 to 2, and 96 Rosenbrock valleys.
CURVATURE = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (4, 96)), jnp.float32)
TARGET = T.normal((4, 96))
START = {"parabola": jnp.zeros((4, 96)), "valley": 0.05 * T.normal((2, 96), 1)}
DESCENT = 2000


def heights(params):
    x, y = params["valley"]
    valley = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return CURVATURE / 2 * (params["parabola"] - TARGET) ** 2, valley


def descend(*optimizers):
    """Returns where each optimizer is after 50 steps and at the end."""

    def step(carry, _):
        new = []
        for tx, (params, state) in zip(optimizers, carry, strict=True):
            grads = jax.grad(lambda p: sum(map(jnp.sum, heights(p))))(params)
            updates, state = tx.update(grads, state, params)
            new.append((optax.apply_updates(params, updates), state))
        return new, [params["parabola"] for params, _ in new]

    carry = [(START, tx.init(START)) for tx in optimizers]
    carry, path = jax.lax.scan(step, carry, length=DESCENT)
    ends = [
        optax.contrib.schedule_free_eval_params(state, params)
        if isinstance(state, optax.contrib.ScheduleFreeState)
        else params
        for params, state in carry
    ]
    return [x[49] for x in path], ends


@every_optimizer()
def test_it_goes_where_optax_goes(row):
    """It reaches the bottom, within Optax's own tolerance, and stays near its path.

    On the path, rounding may push to one side at each of the ten steps that a momentum
    of 0.9 remembers. It pushes by the mean error of normal values: 1.1 % of the
    momentum in 8 bits, 2.2 % in fp8. AdEMAMix's slow momentum remembers 25 steps by
    then. In 4 bits that is 11 %, and a sixteenth of the square holds the variance up,
    so the test asks only for half of the path.
    """
    rate = optax.cosine_decay_schedule(row.rate, DESCENT)
    if row is T.OPTIMIZERS["schedule_free adam8bit"]:
        rate = row.rate
    decay = {"weight_decay": 0.0} if "weight_decay" in row.options else {}
    ours = row.make(rate, min_quantized_size=0, **decay)
    theirs = row.twin(rate, **decay)
    (half_way, want), (end, _) = jax.jit(lambda: descend(ours, theirs))()
    allowed = {8: 0.11, "fp8": 0.22, 4: 0.5}[row.state_bits]
    if row.options.get("centered"):
        allowed = 0.5
    if "b3" in row.options:
        allowed *= 2.5
    apart = np.sqrt(np.mean((half_way - want) ** 2) / np.mean(want**2))
    assert apart < allowed
    assert np.min(heights(START)[1]) > 0.5
    np.testing.assert_allclose(end["parabola"], TARGET, rtol=3e-2, atol=3e-2)
    assert np.max(heights(end)[1]) < 3e-2


# --- On a mesh.


# Optax's own Muon multiplies matrices without a sharding for the product.
@every_optimizer(without=["muon8bit"])
def test_on_an_explicit_mesh(row):
    """Eight devices compute the same; dtypes and shardings do not change."""
    tx, specs = row.make(), {"w": PartitionSpec("x", "y"), "b": PartitionSpec(None)}
    trees = [
        {"w": T.normal((32, 512), seed), "b": T.normal((7,), seed)} for seed in range(4)
    ]

    def three_steps(params, *gradients):
        traces = []

        @jax.jit
        def step(*args):
            traces.append(1)
            return tx.update(*args)

        state = jax.jit(tx.init)(params)
        kinds = jax.tree.map(jax.typeof, (params, state))
        for grads in gradients:
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        assert jax.tree.map(jax.typeof, (params, state)) == kinds
        assert len(traces) == 1
        return params, state

    want, want_state = three_steps(*trees)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        got, state = three_steps(*(jax.device_put(tree, places) for tree in trees))
    split = [x for x in jax.tree.leaves(state) if x.sharding.spec == specs["w"]]
    assert sum(x.dtype.itemsize == 1 for x in split) >= 1
    # XLA may fuse a product and a sum in one of them, and norms sum the parts.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        jax.device_get(got),
        jax.device_get(want),
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
        if ours.dtype == jnp.uint8:
            assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 1e-3


# --- From a file.


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(T.PARAMS["w"])
        self.b = nnx.Param(T.PARAMS["b"])


@every_optimizer()
def test_orbax_takes_an_optimizer_where_it_was(row, tmp_path):
    """After saving at step two and restoring from shapes, step three is the same."""

    def optimizer_of(model):
        return nnx.Optimizer(model, row.make(), wrt=nnx.Param)

    def step(model, optimizer, gradients):
        grads = nnx.state(model, nnx.Param)
        flat = [gradients["b"], gradients["w"]]
        optimizer.update(model, jax.tree.unflatten(jax.tree.structure(grads), flat))

    model = Model()
    optimizer = optimizer_of(model)
    for gradients in T.GRADIENTS[:2]:
        step(model, optimizer, gradients)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()

        def abstract():
            model = Model()
            return model, optimizer_of(model)

        again = nnx.eval_shape(abstract)
        state = checkpointer.restore(tmp_path / "saved", nnx.state(again))
    nnx.update(again, state)
    for each in ((model, optimizer), again):
        step(*each, T.GRADIENTS[2])
    T.assert_same(nnx.state(again), nnx.state((model, optimizer)))
