"""Parameters on a mesh: the same numbers; each device has its own blocks."""

from contextlib import nullcontext

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
import jaxbnb_kernels
from jaxbnb.optim import fused_step, paged
from jaxbnb.planning import collective_bytes

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
    # XLA may fuse a product and a sum in one of them: a float32 step.
    np.testing.assert_allclose(got, want, rtol=2**-21, atol=2**-21)
    differ = np.asarray(codes, np.int32) != np.asarray(want_state[0].mu, np.int32)
    assert np.mean(differ) < 1e-5
    np.testing.assert_allclose(state[0].nu_absmax, want_state[0].nu_absmax, rtol=2**-21)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("shape", "spec"), SPECS.values(), ids=SPECS)
def test_the_state_starts_where_its_parameters_are(shape, spec, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params = jax.device_put(
        np.zeros(shape, np.float32), NamedSharding(mesh, PartitionSpec(*spec))
    )
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else nullcontext():
        state = jaxbnb.adamw8bit(1e-2).init(params)[0]
    blocks = {"within a block": (None, None), "a block would be cut": ("x", None)}
    name = next(k for k, v in SPECS.items() if v == (shape, spec))
    for moment in (state.mu, state.nu):
        assert moment.sharding == params.sharding
    for absmax in (state.mu_absmax, state.nu_absmax):
        if absmax.size > 1:
            want = PartitionSpec(*blocks.get(name, spec))
            assert absmax.sharding == NamedSharding(mesh, want)


@pytest.mark.parametrize(
    "tx", [jaxbnb.adamw8bit(1e-2), jaxbnb.quantize_state(optax.adamax(1e-2))]
)
def test_explicit_axes_need_their_mesh_in_the_context(tx):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    params = jax.device_put(
        np.zeros((64, 1024), np.float32), NamedSharding(mesh, PartitionSpec("x"))
    )
    with pytest.raises(ValueError, match=r"call this within jax\.set_mesh"):
        tx.init(params)


def multi(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


WRAPPED = {
    "alone": jaxbnb.adamw8bit(1e-2),
    "paged": paged(jaxbnb.adamw8bit(1e-2)),
    "quantize_state": jaxbnb.quantize_state(optax.adamax(1e-2)),
    "MultiSteps": multi(jaxbnb.adamw8bit(1e-2)),
    "paged MultiSteps": paged(multi(jaxbnb.quantize_state(optax.adamax(1e-2)))),
}


@pytest.mark.parametrize("cpu", ["always", "never"])
@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_keep_each_part_on_its_device(tx, cpu):
    """With automatic axes, the numbers of one device and an eighth of the bytes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    arrays = np.random.default_rng(0).standard_normal((3, 64, 1024), np.float32)
    step = jax.jit(fused_step(tx))

    def train(place):
        params, *gradients = map(place, arrays)
        state = tx.init(params)
        before = [x.sharding for x in jax.tree.leaves(state) if x.size > 1]
        for grads in gradients:
            params, state = step(grads, state, params)
        large = [x for x in jax.tree.leaves(state) if x.size > 1]
        return params, large, before

    with (
        jax.numpy_dtype_promotion("standard"),  # Optax's.
        jaxbnb_kernels.config.override(cpu=cpu),
    ):
        want = train(jax.numpy.asarray)
        got = train(lambda x: jax.device_put(x, sharding))
    assert got[0].sharding == sharding
    assert len(got[1]) >= 4
    for x, y, before in zip(got[1], want[1], got[2], strict=True):
        assert x.sharding.is_equivalent_to(before, x.ndim)
        assert x.sharding.memory_kind == before.memory_kind
        assert x.addressable_shards[0].data.nbytes == x.nbytes / 8
        if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            # Codes, and on the host bits of floats: rounding moves either by one.
            np.testing.assert_allclose(*(np.asarray(z, np.int64) for z in (x, y)), 0, 1)
    np.testing.assert_allclose(got[0], want[0], rtol=2**-21, atol=2**-21)


SHORT_BLOCKS = {
    "rows that end in one": ((64, 1000), ("x", "y")),
    "of odd length": ((64, 1001), ("x",)),
    "rows that share blocks": ((60, 16), ("x",)),
    "an odd number of them": ((61, 16), (None, "x")),
    "in three axes": ((32, 200, 8), (None, "y")),
}


@pytest.mark.parametrize("cpu", ["always", "never"])
@pytest.mark.parametrize(
    ("shape", "spec"), SHORT_BLOCKS.values(), ids=SHORT_BLOCKS.keys()
)
def test_a_short_last_block_is_the_same_on_a_mesh(shape, spec, cpu):
    """A device that has a part of the blocked axis must not begin its own blocks."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    arrays = np.random.default_rng(0).standard_normal((3, *shape), np.float32)
    tx = jaxbnb.adamw8bit(1e-2, min_quantized_size=0)

    def train(place):
        params, *gradients = map(place, arrays)
        state, step = tx.init(params), jax.jit(fused_step(tx))
        for grads in gradients:
            params, state = step(grads, state, params)
        return params, state

    with jaxbnb_kernels.config.override(cpu=cpu):
        want = train(jax.numpy.asarray)
        got = train(lambda x: jax.device_put(x, sharding))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        if x.dtype == np.uint8:
            # Rounding moves a code by one.
            np.testing.assert_allclose(*(np.asarray(z, np.int64) for z in (x, y)), 0, 1)
        else:
            np.testing.assert_allclose(x, y, rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("spec", [("x", "y"), (("x", "y"),), (None, ("x", "y"))])
@pytest.mark.parametrize("name", ["alone", "paged MultiSteps"])
def test_a_step_without_kernels_sends_nothing(name, spec):
    """A CPU's loop over chunks would gather what it cuts."""
    tx = WRAPPED[name]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = jax.device_put(np.zeros((64, 2048), np.float32), sharding)
    with (
        jax.numpy_dtype_promotion("standard"),  # Optax's.
        jaxbnb_kernels.config.override(cpu="never", mosaic_gpu="never"),
    ):
        state = tx.init(params)
        lowered = jax.jit(fused_step(tx)).lower(params, state, params)
        compiled = lowered.compile()
    # What makes one turn of quantize_state wait for another is a single element.
    assert sum(collective_bytes(compiled).values()) <= 4
