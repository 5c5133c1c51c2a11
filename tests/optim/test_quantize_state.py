"""quantize_state: which arrays it stores as codes, in what format, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb.optim.state_format import StateFormat

FORMATS = {"8 bits": (8, 256), "4 bits": (4, 128), "fp8": ("fp8", 256)}
SHAPES = [(64, 256), (3, 40, 300), (128, 9), (1000, 5), (4099,), (16, 3, 3, 32)]
every_format = pytest.mark.parametrize(
    ("bits", "block_size"), FORMATS.values(), ids=FORMATS
)


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.matrix
@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign", ["both", "positive"])
def test_a_round_trip(sign, shape, bits, block_size):
    """The error is at most half a cell of the map, times the block's absmax."""
    x = normal(shape) if sign == "both" else jnp.abs(normal(shape))
    x = x.at[..., 0].set(0.0)
    form = StateFormat(bits, block_size)
    codes, absmax = form.encode(x)
    assert codes.shape == form.codes_shape(shape)
    assert absmax.ndim == len(shape)
    decoded = form.decode(codes, absmax, shape)
    largest = float(jnp.max(jnp.abs(x)))
    # Widest half cells: the top decade has 64 or 128 parts, or 4 or 8; e4m3 3 bits.
    cells = {8: (64, 128), 4: (4, 8)}.get(bits, (14.4, 14.4))[sign == "positive"]
    half = 0.9 / cells / 2
    # Values above the second highest level, and -1, may be off by a whole cell.
    assert float(jnp.max(jnp.abs(decoded - x))) <= 2 * half * largest
    assert float(jnp.mean(jnp.abs(decoded - x))) <= half / 2 * largest
    np.testing.assert_array_equal(
        decoded == 0, x == 0 if sign == "positive" else decoded == 0
    )
    assert np.all(np.asarray(decoded)[np.asarray(x) == 0] == 0)


@every_format
def test_positive_values_stay_positive(bits, block_size):
    x = jnp.full((4, 256), 1e-12).at[:, 0].set(1.0)
    form = StateFormat(bits, block_size)
    assert jnp.all(form.decode(*form.encode(x), x.shape) > 0)


def test_the_sign_of_an_absmax_says_which_map():
    x = jnp.stack([jnp.abs(normal((256,))), normal((256,))])
    codes, absmax = StateFormat(8, 256).encode(x)
    assert jnp.signbit(absmax)[:, 0].tolist() == [True, False]
    assert codes[0].min() < 127 < codes[1].max()


def test_what_is_held_how():
    tx = jaxbnb.quantize_state(
        optax.adam(1e-3),
        rules=[
            ("embed.*", {"state_bits": 32}),
            (["proj"], {"state_bits": 4}),
            ([r"norm"], {"min_quantized_size": 1}),
        ],
    )
    params = {
        "embed": jnp.ones((64, 64)),
        "proj": jnp.ones((64, 64)),
        "other": jnp.ones((64, 64)),
        "norm": jnp.ones(8),
        "bias": jnp.ones(8),
    }
    mu = tx.init(params).codes[0].mu
    assert {k: (x.dtype.name, x.shape) for k, x in mu.items()} == {
        "embed": ("float32", (64, 64)),
        "proj": ("uint8", (64, 32)),
        "other": ("uint8", (64, 64)),
        "norm": ("uint8", (8,)),
        "bias": ("float32", (8,)),
    }


def test_a_rule_that_matches_nothing():
    tx = jaxbnb.quantize_state(optax.adam(1e-3), rules=[(["head"], {"state_bits": 4})])
    with pytest.raises(ValueError, match=r"'head'.* matches none of the parameters"):
        tx.init({"embed": jnp.ones(4)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"state_bits": 16},
            ValueError,
            "state_bits must be 8, 4, 'fp8' or 32; got 16",
        ),
        ({"block_size": 3}, ValueError, "block_size must be a positive even int"),
        ({"min_quantized_size": -1}, ValueError, "min_quantized_size must be at least"),
        ({"rules": [("a", {"bits": 4})]}, TypeError, "bits"),
        (
            {"rules": [("(", {"state_bits": 4})]},
            ValueError,
            "is not a regular expression",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        jaxbnb.quantize_state(optax.adam(1e-3), **options)


def test_32_bits_is_the_transformation_itself():
    tx = optax.with_extra_args_support(optax.trace(0.9))
    assert jaxbnb.quantize_state(tx, state_bits=32) is tx


MIXED = {
    "a norm of all": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        "the step of others needs 'b'",
    ),
    "a norm of some": (
        optax.chain(
            optax.masked(
                optax.clip_by_global_norm(1.0), {"a": False, "b": True, "c": True}
            ),
            optax.adam(1e-3),
        ),
        "the step of others needs 'b'",
    ),
    "a condition on all": (
        optax.apply_if_finite(optax.adam(1e-3), 3),
        "its shared state needs 'a'",
    ),
    "an estimate from all": (optax.contrib.prodigy(), "its shared state needs 'a'"),
}
THREE = {name: jnp.ones((64, 64)) for name in "abc"}


@pytest.mark.parametrize(("tx", "message"), MIXED.values(), ids=MIXED)
def test_what_mixes_parameters_is_refused(tx, message):
    quantized = jaxbnb.quantize_state(tx)
    for init in (quantized.init, jax.jit(quantized.init)):
        with pytest.raises(ValueError, match=message):
            init(THREE)


def quantized_arrays(tx, params):
    state = jaxbnb.quantize_state(tx).init(params)
    return sum(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))


# Each optimizer with the arrays that it stores for a parameter.
SEPARATE = {
    "shared state of its own": (
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        3,
    ),
    "a norm of each": (optax.lamb(1e-3), 2),
    "averages": (
        optax.contrib.schedule_free(optax.adam(1e-3, b1=0.0), 1e-3),
        3,
    ),
    "more arguments than gradients": (optax.contrib.reduce_on_plateau(), 0),
}


@pytest.mark.parametrize(("tx", "arrays"), SEPARATE.values(), ids=SEPARATE)
def test_what_mixes_none_is_not(tx, arrays):
    assert quantized_arrays(tx, THREE) == arrays * len(THREE)


@pytest.mark.parametrize(("made", "used"), [(8, "fp8"), ("fp8", 8), (8, 32), (8, 4)])
def test_a_state_of_other_bits(made, used):
    """32 bits need a rule here: without one it would be the optimizer itself."""
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones(7)}
    rules = [(["a"], {"state_bits": used})]
    state = jaxbnb.quantize_state(optax.adam(1e-3), state_bits=made).init(params)
    tx = jaxbnb.quantize_state(optax.adam(1e-3), rules=rules)
    with pytest.raises(ValueError, match="Was it made with other state_bits or rules"):
        tx.update(params, state, params)


def test_one_parameter_has_none_to_be_mixed_with():
    assert quantized_arrays(MIXED["a norm of all"][0], {"a": jnp.ones((64, 64))}) == 2


@pytest.mark.parametrize("tx", [optax.sm3(1e-3), optax.lbfgs()], ids=["sm3", "lbfgs"])
def test_state_of_another_shape_than_the_parameters(tx):
    with pytest.raises(NotImplementedError, match="cannot tell which state"):
        jaxbnb.quantize_state(tx).init(THREE)


def test_what_is_not_finite_stays_out_of_the_state():
    params = normal((64, 256))
    tx = jaxbnb.quantize_state(optax.trace(0.9))
    _, state = tx.update(params, tx.init(params))
    bad = params.at[3, 7].set(jnp.nan).at[5, 9].set(jnp.inf)
    updates, after = tx.update(bad, state)
    assert np.argwhere(np.isnan(np.asarray(updates))).tolist() == [[3, 7], [5, 9]]
    assert np.all(np.isfinite(after.absmax.trace))
    decoded = [
        StateFormat(8, 256).decode(s.codes.trace, s.absmax.trace, params.shape)
        for s in (state, after)
    ]
    # It is stored unchanged, except for the block's new absmax.
    cell = 0.9 / 64 * np.abs(np.asarray(after.absmax.trace))[3, 0]
    assert abs(float(decoded[1][3, 7] - decoded[0][3, 7])) <= cell


def test_no_parameters_at_all():
    tx = jaxbnb.quantize_state(optax.scale_by_lion())
    _, state = tx.update({}, tx.init({}))
    assert state.codes.count == 1


def test_one_parameter_is_decoded_at_a_time():
    """For eight of 4 MiB, float32 moments of one take 8 MiB, and of all 64 MiB."""
    params = {str(i): jnp.zeros((1024, 1024)) for i in range(8)}
    tx = jaxbnb.quantize_state(optax.scale_by_lion())

    def step(params, state):
        updates, state = tx.update(params, state)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(tx.init, params))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * 2**20
