"""decode_state and encode_state: Optax's own state, and back to the bit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb import optim
from jaxbnb.optim import StateMismatchError, decode_state, encode_state
from jaxbnb.optim.state_format import StateFormat
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED

pytestmark = pytest.mark.matrix

PARAMS = {"w": (16, 512), "deep": {"v": (70, 90)}, "b": (300,)}

# Each optimizer with its 32-bit twin in Optax.
TWINS = {
    "scale_by_adam8bit": (optim.scale_by_adam8bit(), optax.scale_by_adam()),
    "adam8bit": (jaxbnb.adam8bit(1e-2), optax.adam(1e-2)),
    "adamw8bit": (
        jaxbnb.adamw8bit(optax.linear_schedule(1e-2, 1e-3, 9), nesterov=True),
        optax.adamw(optax.linear_schedule(1e-2, 1e-3, 9), nesterov=True),
    ),
    "lamb8bit": (jaxbnb.lamb8bit(1e-2), optax.lamb(1e-2)),
    "lion8bit": (jaxbnb.lion8bit(1e-2), optax.lion(1e-2)),
    "sgd8bit": (jaxbnb.sgd8bit(1e-2), optax.sgd(1e-2, 0.9)),
    "lars8bit": (jaxbnb.lars8bit(1e-2), optax.lars(1e-2)),
    "rmsprop8bit": (
        jaxbnb.rmsprop8bit(1e-2),
        optax.chain(optax.scale_by_rms(), optax.scale(-1e-2)),
    ),
    "rmsprop8bit, with a count": (
        jaxbnb.rmsprop8bit(1e-2, bias_correction=True),
        jaxbnb.rmsprop8bit(1e-2, bias_correction=True, state_bits=32),
    ),
    "rmsprop8bit, centered": (
        jaxbnb.rmsprop8bit(1e-2, centered=True, momentum=0.9),
        jaxbnb.rmsprop8bit(1e-2, centered=True, momentum=0.9, state_bits=32),
    ),
    "adagrad8bit": (jaxbnb.adagrad8bit(1e-2), optax.adagrad(1e-2)),
    "ademamix8bit": (jaxbnb.ademamix8bit(1e-2), optax.contrib.ademamix(1e-2)),
    "muon8bit": (jaxbnb.muon8bit(1e-2), optax.contrib.muon(1e-2)),
    "adamw4bit": (optim.adamw4bit(1e-2), optax.adamw(1e-2)),
    "adamw_fp8": (optim.adamw_fp8(1e-2), optax.adamw(1e-2)),
    "quantize_state": (
        jaxbnb.quantize_state(
            optax.adamax(1e-2), rules=[(("w",), {"state_bits": 4, "block_size": 64})]
        ),
        optax.adamax(1e-2),
    ),
    "paged_adamw8bit": (jaxbnb.paged_adamw8bit(1e-2), optax.adamw(1e-2)),
    "paged quantize_state": (
        optim.paged(jaxbnb.quantize_state(optax.adam(1e-2)), device_budget=4096),
        optax.adam(1e-2),
    ),
    "in 32 bits": (jaxbnb.adamw8bit(1e-2, state_bits=32), optax.adamw(1e-2)),
}

MASK = {"w": True, "deep": {"v": False}, "b": True}
LABELS = {"w": "x", "deep": {"v": "y"}, "b": "y"}


def nested(adamw, adam, sgd):
    """Puts the same wrappers around either of the two."""
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), adamw(1e-2)),
        "named_chain": optax.named_chain(("a", adam(1e-2)), ("b", sgd(1e-2, 0.9))),
        "masked": optax.masked(adamw(1e-2), MASK),
        "partition": optax.partition({"x": adamw(1e-2), "y": sgd(0.1, 0.9)}, LABELS),
        "MultiSteps": optax.MultiSteps(adamw(1e-2), 2),
        "apply_if_finite": optax.apply_if_finite(adamw(1e-2), 3),
        "inject_hyperparams": optax.inject_hyperparams(adamw)(
            learning_rate=optax.linear_schedule(1e-2, 1e-3, 9)
        ),
    }


NESTED = {
    name: (low, nested(optax.adamw, optax.adam, optax.sgd)[name])
    for name, low in nested(jaxbnb.adamw8bit, jaxbnb.adam8bit, jaxbnb.sgd8bit).items()
}
NESTED["other blocks"] = (
    optim.per_parameter(
        jaxbnb.adamw8bit,
        [(("w",), {"block_size": 300}), (("b",), {"min_quantized_size": 64})],
        learning_rate=1e-2,
        block_size=64,
    ),
    optim.per_parameter(
        lambda learning_rate, weight_decay: optax.adamw(learning_rate),
        [(("w",), {"weight_decay": 0.1}), (("b",), {"weight_decay": 0.2})],
        learning_rate=1e-2,
        weight_decay=0.0,
    ),
)
every_pair = pytest.mark.parametrize(
    ("tx", "twin"),
    [*TWINS.values(), *NESTED.values()],
    ids=[*TWINS, *NESTED],
)


def normal(seed, dtype=jnp.float32):
    """Draws over three decades, so that a block's two largest are rarely close."""
    generator = np.random.default_rng(seed)

    def leaf(shape):
        scale = 10.0 ** generator.integers(-3, 1, shape)
        return jnp.asarray(generator.standard_normal(shape) * scale, dtype)

    return jax.tree.map(leaf, PARAMS, is_leaf=lambda x: isinstance(x, tuple))


def update(tx, grads, state, params):
    # Optax promotes counts.
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(tx.update)(grads, state, params)


@functools.cache
def trained(tx):
    """Returns parameters, and the state after three steps."""
    params = normal(0)
    state = tx.init(params)
    for seed in (1, 2, 3):
        _, state = update(tx, normal(seed), state, params)
    return params, state


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# --- Results.


@every_pair
def test_it_is_the_state_of_the_optimizer_of_optax(tx, twin):
    params, state = trained(tx)
    state = decode_state(tx, state, params)
    want = twin.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for got, like in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)


def magnitudes(twin, grads, state, params, updates):
    """Returns the sum of the terms of each element of an update, without cancellation.

    It takes the same step from absolute values. The step sums gradients, moments and
    parameters with weights of one sign, and divides by a root without a sign. A trust
    ratio then has other norms; elements without cancellation show by which factor.
    """
    terms, _ = update(twin, *jax.tree.map(jnp.abs, (grads, state, params)))

    def leaf(terms, x):
        terms = np.abs(terms)
        ratios = np.divide(np.abs(x), terms, out=np.ones_like(terms), where=terms > 0)
        return terms * max(1.0, np.max(ratios, initial=1.0))

    return jax.tree.map(leaf, terms, updates)


@every_pair
def test_a_step_from_it_is_the_step_from_the_low_bit_state(tx, twin):
    """Both have about eight roundings, and 1 - b2^4, 0.004, is a difference of float32
    numbers near one. Where terms cancel, roundings are relative to the terms, not to
    the rest. Each of Newton-Schulz's five products roughly doubles small singular
    values, so a rounding grows by at most 2^10.
    """
    (params, state), grads = trained(tx), normal(9)
    want, _ = update(tx, grads, state, params)
    decoded = decode_state(tx, state, params)
    got, _ = update(twin, grads, decoded, params)
    terms = magnitudes(twin, grads, decoded, params, want)
    is_muon = "MuonState" in str(jax.tree.structure(twin.init(params)))
    for a, b, size in zip(*map(jax.tree.leaves, (got, want, terms)), strict=True):
        allowed = (8 + 4 / 0.004) * 2**-24 * size
        if is_muon:
            allowed = allowed + 2**10 * 2**-24 * np.abs(b).max()
        assert np.all(np.abs(a - b) <= allowed)


@every_pair
def test_there_and_back_is_the_same_to_the_bit(tx, twin):
    params, state = trained(tx)
    decoded = decode_state(tx, state, params)
    # Some of Optax's states do not have a count.
    without = re.search(
        "TraceState|R(ms|ss|StdDev)State", str(jax.tree.structure(decoded))
    )
    back = encode_state(tx, decoded, params, **({"count": 3} if without else {}))
    if any(x.dtype == jnp.float8_e4m3fn for x in jax.tree.leaves(back)):
        # If two absmax decode to the same values, either may come back.
        assert_same(back[0].codes, state[0].codes)
        assert_same(decode_state(tx, back, params), decoded)
        return
    assert_same(back, state)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(back)}
    assert kinds == {x.sharding.memory_kind for x in jax.tree.leaves(state)}


@pytest.mark.parametrize("tx", [TWINS[k][0] for k in ("adam8bit", "adamw4bit")])
def test_it_can_be_compiled(tx):
    params, state = trained(tx)
    decoded = jax.jit(lambda state: decode_state(tx, state, params))(state)
    assert_same(decoded, decode_state(tx, state, params))
    assert_same(jax.jit(lambda s: encode_state(tx, s, params))(decoded), state)


@pytest.mark.parametrize("tx", [TWINS[k][0] for k in ("adam8bit", "adamw4bit")])
def test_shapes_and_arrays_of_numpy_will_do(tx):
    params, state = trained(tx)
    shapes = jax.eval_shape(lambda: params)
    decoded = decode_state(tx, jax.tree.map(np.asarray, state), shapes)
    assert_same(decoded, decode_state(tx, state, params))
    assert_same(encode_state(tx, jax.tree.map(np.asarray, decoded), shapes), state)


@pytest.mark.parametrize("tx", [TWINS[k][0] for k in ("adam8bit", "adamw4bit")])
def test_moments_of_bfloat16_parameters_are_float32(tx):
    """Optax's own start in bfloat16, but it also continues with float32 ones."""
    params = {"w": jnp.ones((16, 512), jnp.bfloat16)}
    grads = {"w": normal(1)["w"].astype(jnp.bfloat16)}
    _, state = update(tx, grads, tx.init(params), params)
    decoded = decode_state(tx, state, params)
    assert decoded[0].mu["w"].dtype == decoded[0].nu["w"].dtype == jnp.float32
    _, after = update(optax.scale_by_adam(), grads, decoded[0], params)
    assert after.mu["w"].dtype == jnp.float32
    assert_same(encode_state(tx, decoded, params), state)


def test_an_optimizer_of_nnx():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    tx = jaxbnb.adamw8bit(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 64))).sum() ** 2)
    optimizer.update(model, grads(model))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = nnx.as_pure(optimizer.opt_state)
    decoded = decode_state(tx, state, params)
    assert decoded[0].mu["kernel"].dtype == jnp.float32
    encoded = encode_state(tx, decoded, params)
    assert_same(encoded, state)
    nnx.update(optimizer.opt_state, nnx.state(encoded))
    optimizer.update(model, grads(model))
    assert optimizer.opt_state[0].count[...] == 2


@pytest.mark.parametrize("spec", [("x", "y"), (None, "y"), ("x", None)], ids=str)
@pytest.mark.parametrize("name", ["adamw8bit", "quantize_state"])
def test_on_an_explicit_mesh(name, spec):
    tx = {"adamw8bit": jaxbnb.adamw8bit, "quantize_state": optim.adamw4bit}[name](1e-2)
    params = {"w": normal(0)["w"]}
    want = decode_state(tx, update(tx, params, tx.init(params), params)[1], params)
    state = encode_state(tx, want, params)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    with jax.set_mesh(mesh):
        on_mesh = jax.tree.map(
            lambda x: jax.device_put(x, place) if x.shape == (16, 512) else x, want
        )
        params = jax.device_put(params, place)
        encoded = encode_state(tx, on_mesh, params)
        assert_same(jax.device_get(encoded), jax.device_get(state))
        decoded = decode_state(tx, encoded, params)
        assert_same(jax.device_get(decoded), jax.device_get(want))
        assert decoded[0].mu["w"].sharding.spec == PartitionSpec(*spec)


# --- Precision.

SHAPES = [(4096,), (4097,), (64, 300), (1001, 5), (30, 77, 16), (3, 3, 16, 32)]


def blocks_of_all_kinds(shape, seed, signed):
    """Draws normals over 30 decades, with both zeros.

    Some rows are zero, have one element, or have a negative largest element.
    """
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal(shape).reshape(shape[0], -1)
    rows *= 10.0 ** generator.integers(-20, 10, (len(rows), 1))
    rows[::5] *= 10.0 ** generator.integers(-8, 1, rows[::5].shape)
    rows[1::7] = 0.0
    rows[3::7] = -np.abs(rows[3::7])
    rows[4::7, 1:] = -0.0
    x = rows.reshape(shape).astype(np.float32)
    return jnp.asarray(x if signed else np.abs(x))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [*((shape, 256) for shape in SHAPES), ((64, 300), 64), ((1001, 5), 300)],
    ids=str,
)
def test_what_was_decoded_encodes_to_what_it_was(shape, block_size, signed):
    format_ = StateFormat(8, block_size, signed)
    x = blocks_of_all_kinds(shape, 1, signed)
    codes, absmax = format_.encode_exactly(x)
    values = format_.decode(codes, absmax, shape)
    again, absmax_again = format_.encode_exactly(values)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(format_.decode(again, absmax_again, shape), values)
    # Only a nearly empty block can have two absmax for the same values.
    other = np.asarray(absmax_again != absmax)
    assert other.mean() < 0.01
    near = np.nextafter(absmax_again, absmax)
    np.testing.assert_array_equal(near[other], np.asarray(absmax)[other])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("bits", "block_size"), [(8, 256), (4, 128), ("fp8", 256)])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_so_does_what_quantize_state_holds(shape, bits, block_size, signed):
    format_ = StateFormat(bits, block_size)
    x = blocks_of_all_kinds(shape, 2, signed)
    decode = jax.jit(format_.decode, static_argnums=2)
    codes, absmax = jax.jit(format_.encode)(x)
    values = decode(codes, absmax, shape)
    again, absmax_again = jax.jit(format_.encode_exactly)(values)
    # fp8 has two codes for zero.
    np.testing.assert_array_equal(decode(again, absmax_again, shape), values)
    if bits != "fp8":
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("signed", [True, False])
def test_values_of_any_kind_are_rounded_as_a_step_rounds_them(signed):
    x = blocks_of_all_kinds((64, 1024), 3, signed)
    # A single negative element would count as already decoded, so it becomes 1.
    x = x.at[4::7].set(1.0)
    codes, absmax = StateFormat(8, 256, signed).encode_exactly(x)
    levels = (DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED).astype(np.float64)
    blocks = np.asarray(x, np.float64).reshape(-1, 256)
    largest = np.abs(blocks).max(axis=1)
    np.testing.assert_array_equal(np.asarray(absmax).reshape(-1), np.float32(largest))
    if not signed:
        assert np.all((np.asarray(codes) > 0) == (np.asarray(x) > 0))
    # The error is half the gap between levels, which is widest next to -1.
    values = levels[np.asarray(codes).reshape(-1, 256)] * largest[:, None]
    gap = max(np.diff(levels).max(), 2 * (1 + levels[0]) if signed else 0)
    assert np.all(np.abs(values - blocks) <= (gap / 2 + 2**-20) * largest[:, None])


@pytest.mark.parametrize(("signed", "least"), [(True, 2.2e-32), (False, 3.7e-32)])
def test_down_to_where_float32_ends(signed, least):
    """The smallest level of such a block is the smallest normal number."""
    codes = jnp.arange(256, dtype=jnp.uint8)[None].repeat(16, 0)
    format_ = StateFormat(8, 256, signed)
    absmax = jnp.full((16, 1), least, jnp.float32)
    values = format_.decode(codes, absmax, codes.shape)
    again, absmax_again = format_.encode_exactly(values)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(absmax_again, absmax)


def test_state_of_optax_that_was_trained():
    """It is rounded once, and second moments do not become zero."""
    params, want = trained(optax.adamw(1e-2))
    tx = jaxbnb.adamw8bit(1e-2)
    state = encode_state(tx, want, params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    got = decode_state(tx, state, params)
    assert got[0].count == 3
    for field, half_a_gap in (("mu", 0.0071), ("nu", 0.0036)):
        w, like = getattr(got[0], field)["w"], getattr(want[0], field)["w"]
        largest = jnp.abs(like).reshape(16, 2, 256).max(axis=2).repeat(256, axis=1)
        assert jnp.all(jnp.abs(w - like) <= half_a_gap * largest)
        b, like = getattr(got[0], field)["b"], getattr(want[0], field)["b"]
        np.testing.assert_array_equal(b, like)
    assert jnp.all((got[0].nu["w"] > 0) == (want[0].nu["w"] > 0))


def test_ten_round_trips_change_nothing():
    """Naive ones would each shrink a block with a negative largest element by 0.7%."""
    tx = jaxbnb.lion8bit(1e-2)
    params, want = trained(tx)
    state = want
    for _ in range(10):
        state = encode_state(tx, decode_state(tx, state, params), params)
    assert_same(state, want)


def test_from_one_low_bit_form_to_another():
    """8-bit state moves to other blocks and to 4 bits, and from there to itself."""
    four, eight = optim.adamw4bit(1e-2), jaxbnb.adamw8bit(1e-2)
    paged = jaxbnb.paged_adamw8bit(1e-2, block_size=64)
    params, state = trained(eight)
    decoded = decode_state(eight, state, params)
    moved = encode_state(paged, decoded, params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moved)} == {"pinned_host"}
    assert optim.unpage(paged, moved, params)[0].mu_absmax["w"].shape == (16, 8)
    fresh = encode_state(four, decoded, params)
    want = jaxbnb.quantize_state(optax.adamw(1e-2), state_bits=4).init(params)
    assert jax.tree.structure(fresh[0]) == jax.tree.structure(
        type(want)(want.codes[0], want.absmax[0])
    )
    in_four = decode_state(four, fresh, params)
    step = update(four, normal(5), fresh, params)[1]
    assert step[0].codes.count == 4
    again = encode_state(four, in_four, params)
    assert_same(again, fresh)


# --- Counts that Optax lacks.


def test_a_count_that_optax_does_not_have():
    tx = jaxbnb.sgd8bit(1e-2, dampening=0.5)
    params, state = trained(tx)
    state = decode_state(tx, state, params)
    assert encode_state(tx, state, params)[0].count == 1
    assert encode_state(tx, state, params, count=7)[0].count == 7
    fresh = decode_state(tx, tx.init(params), params)
    assert encode_state(tx, fresh, params)[0].count == 0
    assert encode_state(tx, fresh, params)[0].count.dtype == jnp.int32
    # The first gradient counts in full, all others by half.
    for like, part in ((state, 0.5), (fresh, 1.0)):
        state = encode_state(tx, like, params)
        _, after = update(tx, normal(5), state, params)
        np.testing.assert_allclose(
            decode_state(tx, after, params)[0].trace["b"],
            0.9 * like[0].trace["b"] + part * normal(5)["b"],
            rtol=2**-22,
            atol=2**-22,
        )


def test_no_count_where_optax_has_them_all():
    params, tx = normal(0), jaxbnb.adam8bit(1e-2)
    with pytest.raises(ValueError, match="the state has all counts"):
        encode_state(tx, optax.adam(1e-2).init(params), params, count=3)


# --- Errors.


def adam_state(**changes):
    return optax.adam(1e-2).init(PARAMS | changes)


@pytest.mark.parametrize(
    ("tx", "made_by", "params", "message"),
    [
        (jaxbnb.adam8bit(1), jaxbnb.adam8bit(1), {"w": (8, 512)}, "shape (8, 512)"),
        (
            jaxbnb.adam8bit(1),
            jaxbnb.adam8bit(1, block_size=128),
            {"w": (16, 512)},
            "shape (16, 4) at [0].mu_absmax['w'], where (16, 2) belongs",
        ),
        (
            jaxbnb.adam8bit(1),
            optax.chain(optim.scale_by_lion8bit(), optax.scale(1)),
            {"w": (16, 512)},
            "ScaleByLion8bitState(count, mu, mu_absmax) at [0], where",
        ),
        (
            jaxbnb.adam8bit(1),
            optax.adam(1),
            {"w": (16, 512)},
            "ScaleByAdamState(count, mu, nu) at [0], where ScaleByAdam8bitState(",
        ),
        (
            jaxbnb.adam8bit(1),
            jaxbnb.adam8bit(1),
            {"w": (16, 512), "b": (8,)},
            "dict(b, w) at [0].mu, where dict(w) belongs",
        ),
        (
            optim.adamw4bit(1),
            optim.adamw_fp8(1, block_size=128),
            {"w": (16, 512)},
            "shape (16, 512) at [0].codes.mu['w'], where (16, 256) belongs",
        ),
        (
            optim.adamw_fp8(1),
            jaxbnb.quantize_state(optax.scale_by_adam()),
            {"w": (16, 512)},
            "QuantizedState(codes, absmax) at its top",
        ),
        (
            jaxbnb.paged_adam8bit(1),
            jaxbnb.paged_adam8bit(1),
            {"w": (8, 512)},
            "shape (8, 512)",
        ),
    ],
)
def test_a_state_of_something_else(tx, made_by, params, message):
    def ones(shapes):
        return {name: jnp.ones(shape) for name, shape in shapes.items()}

    state = made_by.init(ones(params))
    with pytest.raises(StateMismatchError, match=re.escape(message)):
        decode_state(tx, state, ones({"w": (16, 512)}))


def test_codes_of_another_dtype():
    params = {"w": jnp.ones((16, 512))}
    state = optim.adamw_fp8(1).init(params)
    tx = jaxbnb.adamw8bit(1, state_bits="fp8")
    assert decode_state(tx, state, params)
    eight = jaxbnb.quantize_state(optax.scale_by_adam())
    with pytest.raises(StateMismatchError, match="float8_e4m3fn, and tx of uint8"):
        decode_state(eight, state[0], params)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (optax.adam(1).init({"w": jnp.ones((8, 512))}), "shape (8, 512)"),
        (optax.lion(1).init({"w": jnp.ones((16, 512))}), "at its top"),
        (jaxbnb.adam8bit(1).init({"w": jnp.ones((16, 512))}), "ScaleByAdam8bitState"),
        (optax.adam(1).init({"w": jnp.ones((16, 512), jnp.int32)}), "dtype int32"),
    ],
    ids=["shape", "optimizer", "low-bit", "integers"],
)
def test_a_32_bit_state_of_something_else(state, message):
    with pytest.raises(StateMismatchError, match=re.escape(message)):
        encode_state(jaxbnb.adam8bit(1), state, {"w": jnp.ones((16, 512))})


def test_a_wrapper_that_rebuilds_the_state():
    inner = jaxbnb.adam8bit(1)
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.asarray, inner.init(params)), inner.update
    )
    params = {"w": jnp.ones((16, 512))}
    with pytest.raises(NotImplementedError, match="ScaleByAdam8bitState rebuilds"):
        decode_state(tx, tx.init(params), params)
    inside = optax.chain(jaxbnb.paged_adam8bit(1), optax.scale(0.5))
    with pytest.raises(NotImplementedError, match="where it is outermost"):
        decode_state(inside, inside.init(params), params)
