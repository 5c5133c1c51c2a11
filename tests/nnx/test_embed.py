"""QuantEmbed of both Flax APIs, beside their own Embed of the decoded rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.nnx import QuantEmbed

IDS = jnp.array([[0, 1, 29], [7, 7, -1]])


def table(rows=30, features=64, dtype=jnp.float32):
    x = np.random.default_rng(0).standard_normal((rows, features))
    return jnp.asarray(x, dtype)


def make_nnx(config, dtype=None, param_dtype=jnp.float32):
    """``(look up, attend, the quantised rows)``."""
    layer = nnx.Embed(30, 64, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    layer.embedding[...] = table(dtype=param_dtype)
    quantized = QuantEmbed.from_embed(layer, config)
    return quantized, quantized.attend, quantized.embedding[...]


def make_linen(config, dtype=None, param_dtype=jnp.float32):
    layer = jaxbnb.linen.QuantEmbed(
        30, 64, config=config, dtype=dtype, param_dtype=param_dtype
    )
    rows = config.quantize_embedding(table(dtype=param_dtype))
    variables = {"quantized": {"embedding": rows}}

    def attend(query):
        return layer.apply(variables, query, method="attend")

    return (lambda ids: layer.apply(variables, ids)), attend, rows


both_apis = pytest.mark.parametrize("make", [make_nnx, make_linen])


@both_apis
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("nf4"),
        QuantConfig("nf4", double_quant=True),
        QuantConfig("int8", block_size=32),
        QuantConfig("dynamic8"),
    ],
    ids=lambda c: f"{c.quant_type}{'-nested' * c.double_quant}",
)
def test_it_embeds_and_attends_with_the_decoded_rows(make, config):
    look_up, attend, rows = make(config)
    assert (rows.shape, rows.axis) == ((30, 64), -1)
    decoded = rows.dequantize()
    np.testing.assert_array_equal(look_up(IDS), decoded[IDS])
    np.testing.assert_array_equal(jax.jit(look_up)(IDS), decoded[IDS])
    query = table(rows=5)
    got = np.asarray(attend(query), np.float64)
    exact = np.asarray(query, np.float64) @ np.asarray(decoded, np.float64).T
    terms = np.abs(np.asarray(query)) @ np.abs(np.asarray(decoded)).T
    # 64 products summed in float32.
    assert np.all(np.abs(got - exact) <= 66 * 2.0**-24 * terms)


@both_apis
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "expected"),
    [
        (None, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
    ],
)
def test_dtypes(make, dtype, param_dtype, expected):
    look_up, attend, rows = make(QuantConfig("nf4"), dtype, param_dtype)
    got = look_up(IDS)
    assert got.dtype == expected
    np.testing.assert_array_equal(
        got.astype(jnp.float32), rows.dequantize(expected)[IDS].astype(jnp.float32)
    )
    # nnx.Embed has the dtype of its embedding, unless it is given one.
    query = table(rows=5, dtype=jnp.float16)
    has_one = dtype is not None or make is make_nnx
    assert attend(query).dtype == (expected if has_one else jnp.float16)


@both_apis
def test_an_id_out_of_range_is_nan_as_of_flax(make):
    look_up, _, _ = make(QuantConfig("nf4"))
    ids = jnp.array([30, -31, 29])
    layer = nn.Embed(30, 64)
    theirs = layer.apply({"params": {"embedding": table()}}, ids)
    np.testing.assert_array_equal(np.isnan(look_up(ids)), np.isnan(theirs))
    assert np.isnan(theirs).all(axis=1).tolist() == [True, True, False]


@both_apis
def test_ids_that_are_floats_are_refused(make):
    look_up, _, _ = make(QuantConfig("nf4"))
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        look_up(jnp.ones(3))


def test_of_the_same_seed_it_quantises_what_flax_draws():
    config = QuantConfig("int8")
    ours = QuantEmbed(30, 64, config=config, rngs=nnx.Rngs(7))
    theirs = nnx.Embed(30, 64, rngs=nnx.Rngs(7))
    want = config.quantize_embedding(theirs.embedding[...])
    jax.tree.map(np.testing.assert_array_equal, ours.embedding[...], want)
    key = jax.random.key(7)
    got = jaxbnb.linen.QuantEmbed(30, 64, config=config).init(key, IDS)
    drawn = nn.Embed(30, 64).init(key, IDS)["params"]["embedding"]
    jax.tree.map(
        np.testing.assert_array_equal,
        got["quantized"]["embedding"],
        config.quantize_embedding(drawn),
    )


def test_stacked_rows_are_scanned():
    tables = jnp.stack([table(), 2 * table()])
    stacked = QuantConfig("nf4").quantize_embedding(tables)

    _, got = jax.lax.scan(
        lambda _, rows: (None, jaxbnb.core.embed(IDS, rows)), None, stacked
    )
    np.testing.assert_array_equal(got, stacked.dequantize()[:, IDS])


def test_a_tied_model_trains_what_is_between():
    """The rows are frozen, and gradients pass through the head."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = QuantEmbed(30, 64, rngs=rngs)
            self.middle = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.middle(self.embed(ids)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
    before = model.embed.embedding[...].codes

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(IDS)
            targets = jnp.roll(IDS % 30, 1)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    first = step(model, optimizer)
    for _ in range(20):
        last = step(model, optimizer)
    assert last < first / 2
    np.testing.assert_array_equal(model.embed.embedding[...].codes, before)


def test_what_core_embed_refuses():
    matrix = jaxbnb.quantize(table(), "nf4", axis=-2)
    with pytest.raises(ValueError, match=r"blocked along its last axis.*axis -2"):
        jaxbnb.core.embed(IDS, matrix)
    with pytest.raises(ValueError, match=r"got shape \(2, 30, 64\)"):
        jaxbnb.core.embed(IDS, jaxbnb.quantize(jnp.ones((2, 30, 64)), "nf4"))
    with pytest.raises(TypeError, match=r"make one with jaxbnb\.quantize"):
        jaxbnb.core.embed(IDS, table())


def test_a_transpose_reads_the_same_arrays():
    for axis in (-1, -2):
        q = jaxbnb.quantize(jnp.stack([table(), 2 * table()]), "nf4", axis=axis)
        np.testing.assert_array_equal(q.mT.dequantize(), q.dequantize().mT)
        assert q.mT.codes is q.codes
        assert q.mT.mT.axis == q.axis
    with pytest.raises(ValueError, match=r"matrix.*shape \(64,\)"):
        _ = jaxbnb.quantize(jnp.ones(64), "nf4").mT
    with pytest.raises(ValueError, match="along axis -3"):
        _ = jaxbnb.quantize(jnp.ones((2, 4, 8)), "nf4", axis=0).mT
