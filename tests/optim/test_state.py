"""How the 8-bit optimizers' state lies in memory, and how much it takes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxbnb
from jaxbnb.optim import scale_by_adam8bit
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED

# Shape, axis and number: that many elements along the axis, with all axes after it,
# make a block of 256.
LAYOUTS = [
    ((4096,), 0, 256),
    ((4097,), 0, 256),
    ((64, 1024), 1, 256),
    ((17, 300), 1, 256),
    ((4096, 1), 0, 256),
    ((1, 4100), 1, 256),
    ((4096, 16), 0, 16),
    ((1001, 5), 0, 51),
    ((30, 576, 16), 1, 16),
    ((3, 3, 64, 128), 2, 2),
    ((7, 3, 3, 70), 2, 3),
    ((300, 4, 4), 0, 16),
]
every_layout = pytest.mark.parametrize(
    ("shape", "axis", "step"), LAYOUTS, ids=lambda x: str(x) if x is not None else ""
)


def normal(shape, dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x, dtype)


def first_step(tx, grads):
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)


@every_layout
def test_codes_are_of_the_parameters_shape_and_absmax_of_its_rank(shape, axis, step):
    state = scale_by_adam8bit().init(jnp.ones(shape))
    blocks = -(-shape[axis] // step)
    for codes, zero in ((state.mu, 127), (state.nu, 0)):
        assert (codes.dtype, codes.shape) == (jnp.uint8, shape)
        assert jnp.all(codes == zero)
    for absmax in (state.mu_absmax, state.nu_absmax):
        assert absmax.dtype == jnp.float32
        trailing = (1,) * (len(shape) - axis - 1)
        assert absmax.shape == (*shape[:axis], blocks, *trailing)
        assert not jnp.any(absmax)


@pytest.mark.parametrize(("shape", "axis", "step"), LAYOUTS[1::2], ids=str)
def test_an_absmax_is_of_its_block(shape, axis, step):
    """It covers exactly those elements, to the bit, and codes decode to the moments."""
    g = normal(shape)
    _, state = first_step(scale_by_adam8bit(), g)
    g = np.asarray(g)
    mu = np.float32(1 - 0.9) * g
    nu = np.float32(1 - 0.999) * g * g
    for codes, absmax, moment, levels in (
        (state.mu, state.mu_absmax, mu, DYNAMIC8_SIGNED),
        (state.nu, state.nu_absmax, nu, DYNAMIC8_UNSIGNED),
    ):
        starts = np.arange(0, shape[axis], step)
        want = np.maximum.reduceat(np.abs(moment), starts, axis=axis)
        want = want.max(axis=tuple(range(axis + 1, len(shape))), keepdims=True)
        np.testing.assert_array_equal(absmax, want.reshape(absmax.shape))
        size = np.repeat(want, step, axis=axis).take(range(shape[axis]), axis=axis)
        decoded = levels[np.asarray(codes)] * size
        # The bound is half the widest gap; the signed map's is from -0.993 to -1.
        gap = np.diff(np.append(-1.0, levels) if levels[0] < 0 else levels).max()
        assert np.all(np.abs(decoded - moment) <= (gap / 2 + 2**-20) * size)


# Shapes from language and vision models, including adapters.
REAL_SHAPES = [
    (4096, 4096),
    (49152, 576),
    (576, 1536),
    (30, 576, 16),
    (30, 16, 576),
    (30, 576, 576),
    (3, 3, 64, 128),
    (7, 7, 3, 64),
    (32, 128, 4096),
    (16, 8),
    (768,),
]


@every_layout
def test_in_every_step_an_absmax_is_of_its_block_alone(shape, axis, step):
    """Its largest element has the largest code, even if a short block is padded and its
    moments were much larger one step before."""
    tx = scale_by_adam8bit()
    grads = normal(shape)
    state = tx.init(grads)
    for scale in (1.0, -0.8):
        _, state = jax.jit(tx.update)(np.float32(scale) * grads, state)
    for codes, tops in ((state.mu, (0, 255)), (state.nu, (255,))):
        is_top = np.isin(codes, tops)
        starts = np.arange(0, shape[axis], step)
        found = np.maximum.reduceat(is_top, starts, axis=axis)
        assert np.all(found.any(axis=tuple(range(axis + 1, len(shape)))))


def bytes_a_parameter(shapes, **options):
    params = {
        str(i): jax.ShapeDtypeStruct(s, jnp.bfloat16) for i, s in enumerate(shapes)
    }
    state = jax.eval_shape(scale_by_adam8bit(**options).init, params)
    count = sum(math.prod(shape) for shape in shapes)
    return (jaxbnb.core.tree_nbytes(state) - 4) / count


@pytest.mark.parametrize("shape", REAL_SHAPES[:-2], ids=str)
def test_bytes_a_parameter(shape):
    assert 2.0 < bytes_a_parameter([shape]) <= 2.1


def test_bytes_of_a_model():
    assert bytes_a_parameter(REAL_SHAPES) <= 2.04
    assert bytes_a_parameter(REAL_SHAPES, min_quantized_size=2**60) < 8.0001
    assert bytes_a_parameter([(4096, 4096)], block_size=64) == 2 + 8 / 64


def test_two_bytes_are_what_is_held():
    """It measures arrays, not only shapes."""
    state = jaxbnb.adamw8bit(1e-3).init(jnp.ones((256, 1024), jnp.bfloat16))
    assert (
        sum(x.nbytes for x in jax.tree.leaves(state)) == 256 * 1024 * (2 + 8 / 256) + 4
    )


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (64, 0), (0, 4096), (4095,), (63, 65), (1, 1, 1)], ids=str
)
def test_small_leaves_are_float32(shape):
    state = scale_by_adam8bit().init(jnp.ones(shape, jnp.bfloat16))
    for moment in (state.mu, state.nu):
        assert (moment.dtype, moment.shape) == (jnp.float32, shape)
        assert not jnp.any(moment)
    for absmax in (state.mu_absmax, state.nu_absmax):
        assert (absmax.dtype, absmax.shape) == (jnp.float32, (1,) * len(shape))
        assert not jnp.any(absmax)


def test_min_quantized_size():
    def dtypes(size, min_quantized_size):
        tx = scale_by_adam8bit(min_quantized_size=min_quantized_size)
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(size, jnp.float32))
        return {state.mu.dtype.name, state.nu.dtype.name}

    assert dtypes((64, 64), 4096) == {"uint8"}
    assert dtypes((64, 64), 4097) == {"float32"}
    assert dtypes((1,), 0) == {"uint8"}
    # A scalar lacks an axis for blocks, and the other lacks elements.
    assert dtypes((), 0) == dtypes((0,), 0) == {"float32"}


def test_block_size():
    for block_size, blocks in ((2, 512), (64, 16), (300, 4), (1024, 1), (4096, 1)):
        state = scale_by_adam8bit(block_size=block_size).init(jnp.ones((64, 1024)))
        rows = 16 if block_size == 4096 else 64
        assert state.mu_absmax.shape == state.nu_absmax.shape == (rows, blocks)


def test_steps_change_neither_dtypes_nor_shapes_nor_structure():
    """A compiled step must be able to take its own result."""
    params = {
        "scalar": normal(()),
        "empty": jnp.zeros((0, 5)),
        "small": normal((7, 3), jnp.bfloat16),
        "ragged": normal((17, 300), jnp.float16),
        "nested": [normal((4096, 1), jnp.bfloat16), {"conv": normal((3, 3, 64, 128))}],
        "none": None,
    }
    tx = jaxbnb.adamw8bit(1e-3)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        grads = jax.tree.map(lambda p: p * jnp.asarray(0.5, p.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(
        jax.typeof, jax.eval_shape(tx.init, params)
    )
    new_params, new_state = params, state
    for _ in range(3):
        new_params, new_state = step(new_params, new_state)
        for old, new in ((params, new_params), (state, new_state)):
            assert jax.tree.structure(old) == jax.tree.structure(new)
            assert jax.tree.map(jax.typeof, old) == jax.tree.map(jax.typeof, new)
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert int(new_state[0].count) == 3
    for leaf in jax.tree.leaves((new_params, new_state)):
        assert jnp.all(jnp.isfinite(leaf))


def test_init_of_shapes_without_arrays():
    """A checkpoint may be restored into the state of an abstract model."""
    tx = jaxbnb.adamw8bit(1e-3)
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    want = tx.init(params)
    abstract = jax.eval_shape(lambda: params)
    for got in (tx.init(abstract), jax.jit(tx.init)(params)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert jax.tree.structure(got) == jax.tree.structure(want)


def test_one_spec_serves_a_parameter_and_its_state():
    """`optax.tree_map_params` is used to shard a state or to freeze parts of it."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), jaxbnb.adamw8bit(1e-3))
    params = {"w": jnp.ones((64, 1024)), "b": jnp.ones(8)}
    specs = {"w": PartitionSpec("x", "y"), "b": PartitionSpec()}
    mapped = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(params),
        specs,
        transform_non_params=lambda _: "other",
    )
    adam = mapped[1][0]
    assert adam.count == "other"
    for tree in (adam.mu, adam.nu, adam.mu_absmax, adam.nu_absmax):
        assert tree == specs


def test_states_are_found_by_name():
    state = optax.chain(optax.identity(), jaxbnb.adam8bit(1e-3)).init(jnp.ones(4096))
    assert optax.tree.get(state, "mu").dtype == jnp.uint8
    assert optax.tree.get(state, "nu_absmax").shape == (16,)
    assert optax.tree.get(state, "count") == 0


def test_parameters_of_flax_as_they_are():
    """The state has the structure of an nnx.State or a Linen dict."""
    nnx_params = nnx.state(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Param)
    linen_params = nn.Dense(64).init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    for params in (nnx_params, linen_params):
        mu = scale_by_adam8bit().init(params).mu
        assert type(mu) is type(params)
        assert mu["kernel"].dtype == jnp.uint8
        assert mu["bias"].dtype == jnp.float32


# --- Errors.

MAKERS = {
    "scale_by_adam8bit": scale_by_adam8bit,
    "adam8bit": lambda **kwargs: jaxbnb.adam8bit(1e-3, **kwargs),
    "adamw8bit": lambda **kwargs: jaxbnb.adamw8bit(1e-3, **kwargs),
    "paged_adam8bit": lambda **kwargs: jaxbnb.paged_adam8bit(1e-3, **kwargs),
    "paged_adamw8bit": lambda **kwargs: jaxbnb.paged_adamw8bit(1e-3, **kwargs),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bad_sizes(make):
    for block_size in (0, -256, 3, 256.0, True):
        with pytest.raises(ValueError, match="block_size must be a positive even int"):
            make(block_size=block_size)
    with pytest.raises(
        ValueError, match="min_quantized_size must be at least 0; got -1"
    ):
        make(min_quantized_size=-1)
    with pytest.raises(TypeError, match="blocksize"):
        make(blocksize=256)


@pytest.mark.parametrize(
    ("dtype", "todo"),
    [
        (jnp.int32, "Leave it out"),
        (jnp.bool_, "Leave it out"),
        (
            jnp.complex64,
            r"Wrap the optimizer: optax\.contrib\.split_real_and_imaginary",
        ),
    ],
)
def test_parameters_that_are_not_floating(dtype, todo):
    params = {"table": jnp.ones((5, 3), dtype), "w": jnp.ones((64, 64))}
    message = rf"for 'table' got .* of shape \(5, 3\)\. {todo}"
    with pytest.raises(TypeError, match=message):
        jaxbnb.adam8bit(1e-3).init(params)
    masked = optax.masked(jaxbnb.adam8bit(1e-3), {"table": False, "w": True})
    assert masked.init(params).inner_state[0].mu["w"].dtype == jnp.uint8


@pytest.mark.parametrize(
    "tx", [jaxbnb.adamw8bit(1e-3), jaxbnb.optim.adam4bit(1e-3), jaxbnb.muon8bit(1e-3)]
)
def test_quantised_parameters_are_not_trained(tx):
    kernel = jaxbnb.quantize(jnp.ones((64, 64)), "nf4")
    params = {"up": {"bias": jnp.ones(64), "kernel": kernel}}
    with pytest.raises(
        TypeError, match=r"'up\.kernel' is quantised.*split_quantized\("
    ):
        tx.init(params)
    trained, _ = jaxbnb.linen.split_quantized(params)
    jax.eval_shape(tx.init, trained)


def test_a_state_of_other_parameters_or_options():
    grads = jnp.ones((64, 1024))
    others = {
        "another block_size": scale_by_adam8bit(block_size=64).init(grads),
        "another shape": scale_by_adam8bit().init(grads.T),
        "another size": scale_by_adam8bit().init(grads[:32]),
    }
    for state in others.values():
        with pytest.raises(ValueError, match="another parameter or block_size"):
            scale_by_adam8bit().update(grads, state)
    with pytest.raises(ValueError, match="dict"):
        scale_by_adam8bit().update({"w": grads}, scale_by_adam8bit().init(grads))


def test_init_decides_what_is_quantised():
    """A checkpoint continues even if min_quantized_size has changed since."""
    grads = jnp.linspace(-1, 1, 4096).reshape(64, 64)
    eight, full = scale_by_adam8bit(), scale_by_adam8bit(min_quantized_size=2**30)
    for made in (eight, full):
        results = [tx.update(grads, made.init(grads)) for tx in (eight, full)]
        jax.tree.map(np.testing.assert_array_equal, *results)
        assert results[0][1].mu.dtype == made.init(grads).mu.dtype


def test_a_small_state_of_another_shape():
    state = scale_by_adam8bit().init(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="another parameter or block_size"):
        scale_by_adam8bit().update(jnp.ones((7, 3)), state)
