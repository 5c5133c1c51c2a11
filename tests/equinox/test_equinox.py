"""jaxbnb.equinox: quantised layers, adapters and files of Equinox models."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb

eqx = pytest.importorskip("equinox")

from jaxbnb.equinox import (  # noqa: E402
    LoraLinear,
    QuantEmbedding,
    QuantLinear,
    adapter_filter,
    add_adapters,
    dequantize_model,
    merge_adapters,
    quantize_model,
    report,
)


class Model(eqx.Module):
    """Tokens to logits, with a layer of each kind."""

    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    gate: eqx.nn.Linear
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.embed = eqx.nn.Embedding(64, 64, key=keys[0])
        self.conv = eqx.nn.Conv1d(64, 64, 1, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(4, 64, key=keys[2])
        self.norm = eqx.nn.LayerNorm(64)
        self.mlp = eqx.nn.MLP(64, 64, 128, depth=1, key=keys[3])
        self.gate = eqx.nn.Linear(64, "scalar", key=keys[4])
        self.lm_head = eqx.nn.Linear(64, 64, key=keys[5])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        x = x + self.conv(x.T).T
        x = x + self.attention(x, x, x)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))
        x = x * jax.nn.sigmoid(jax.vmap(self.gate)(x))[:, None]
        return jax.vmap(self.lm_head)(x)


LINEARS = [
    *(f"attention.{name}_proj" for name in ("query", "key", "value", "output")),
    *("mlp.layers.0", "mlp.layers.1", "gate"),
]


@pytest.fixture(scope="module")
def model():
    return Model(jax.random.key(0))


@pytest.fixture(scope="module")
def quantized(model):
    return quantize_model(model, "nf4", rules=[(["embed"], "int8")])


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (8,), 0, 64)


def run(model, ids):
    return eqx.filter_jit(lambda model, ids: model(ids))(model, ids)


def test_it_computes_what_decoded_weights_do(model, quantized, ids):
    found = report(quantized)
    assert sorted(found) == sorted([*LINEARS, "embed"])
    assert found.left_alone == {"conv.weight": (64, 64, 1), "lm_head.weight": (64, 64)}
    assert type(model.gate) is eqx.nn.Linear
    decoded = dequantize_model(quantized)
    assert jax.tree.structure(decoded) == jax.tree.structure(model)
    want = jaxbnb.quantize(model.mlp.layers[0].weight, "nf4", axis=-1).dequantize()
    np.testing.assert_array_equal(decoded.mlp.layers[0].weight, want)
    # Products of up to 128 terms of order one, five layers deep: float32's rounding.
    np.testing.assert_allclose(
        run(quantized, ids), run(decoded, ids), rtol=0, atol=128 * 5 * 2**-24
    )


def test_products_of_int8_by_int8(model):
    """The options of a config reach the product."""
    x = jax.random.normal(jax.random.key(1), (64,))
    layer = QuantLinear(model.gate, jaxbnb.QuantConfig("llm_int8", outlier_threshold=2))
    want = jaxbnb.matmul(x, layer.weight.mT, outlier_threshold=2)[0] + layer.bias[0]
    np.testing.assert_array_equal(layer(x), want)


def test_no_filter_sees_codes_or_absmax(quantized, ids):
    """Neither gradients, nor decay, nor casts reach a quantised weight."""
    loss = eqx.filter_grad(lambda model: jnp.mean(model(ids) ** 2))
    grads = eqx.filter_jit(loss)(quantized)
    assert jax.tree.leaves(grads.mlp.layers[0].stored) == []
    assert float(jnp.max(jnp.abs(grads.mlp.layers[0].bias))) > 0
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, quantized
    )
    np.testing.assert_array_equal(
        half.gate.weight.dequantize(), quantized.gate.weight.dequantize()
    )


def test_adapters_lower_the_loss(quantized, ids):
    model = add_adapters(quantized, r=4, key=jax.random.key(2), alpha=8)
    assert isinstance(model.attention.query_proj, LoraLinear)
    assert type(model.lm_head) is eqx.nn.Linear
    np.testing.assert_array_equal(run(model, ids), run(quantized, ids))
    adapters, rest = eqx.partition(model, adapter_filter(model))
    assert len(jax.tree.leaves(adapters)) == 2 * len(LINEARS)
    tx = jaxbnb.adamw8bit(1e-2)

    def loss(adapters):
        logits = eqx.combine(adapters, rest)(ids)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:])
        )

    @eqx.filter_jit
    def step(adapters, state):
        value, grads = eqx.filter_value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return eqx.apply_updates(adapters, updates), state, value

    state, losses = tx.init(adapters), []
    for _ in range(10):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    trained = eqx.combine(adapters, rest)
    merged = merge_adapters(trained)
    assert type(merged.attention.query_proj) is eqx.nn.Linear
    # The sums of weights and updates are rounded, and products summed otherwise.
    np.testing.assert_allclose(
        run(merged, ids), run(trained, ids), rtol=0, atol=128 * 5 * 2**-22
    )


def test_files(quantized, ids):
    """What Equinox saved loads into an abstract model, without random weights."""
    model = add_adapters(quantized, r=2, key=jax.random.key(2))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)

    empty = eqx.filter_eval_shape(Model, jax.random.key(3))
    empty = quantize_model(empty, "nf4", rules=[(["embed"], "int8")])
    add = functools.partial(add_adapters, r=2, key=jax.random.key(3))
    like = eqx.filter_eval_shape(add, empty)
    loaded = eqx.tree_deserialise_leaves(file, like)
    np.testing.assert_array_equal(run(loaded, ids), run(model, ids))


def test_a_stack_of_layers():
    """Layers made by filter_vmap, and scanned over."""

    def make(key):
        return eqx.nn.Linear(64, 64, key=key)

    stack = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 3))
    config = jaxbnb.QuantConfig("nf4", double_quant=True)
    quantized = quantize_model([stack], config)
    quantized = add_adapters(quantized, r=2, key=jax.random.key(1))[0]
    dynamic, static = eqx.partition(quantized, eqx.is_array)

    def body(x, layer):
        return jnp.tanh(eqx.combine(layer, static)(x)), None

    got, _ = jax.lax.scan(body, jnp.ones(64), dynamic)
    decoded = dequantize_model([quantized.base])[0]
    want = jnp.ones(64)
    for weight, bias in zip(decoded.weight, decoded.bias, strict=True):
        want = jnp.tanh(weight @ want + bias)
    np.testing.assert_allclose(got, want, rtol=0, atol=3 * 64 * 2**-24)


def test_a_layer_that_shared_reads_is_tied(ids):
    """A quantised embedding is also the head, and is stored once."""
    keys = jax.random.split(jax.random.key(0))
    pair = (
        eqx.nn.Embedding(64, 64, key=keys[0]),
        eqx.nn.Linear(64, 64, use_bias=False, key=keys[1]),
    )
    shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
    quantized = quantize_model(shared, rules=[(["pytree.0"], "int8")])
    assert report(quantized) == ["pytree.0"]
    embedding, head = quantized()
    assert isinstance(embedding, QuantEmbedding)
    x = jax.vmap(embedding)(ids)
    want = x @ embedding.to_embedding().weight.T
    np.testing.assert_allclose(jax.vmap(head)(x), want, rtol=1e-5, atol=1e-4)


def test_rows_out_of_range_are_equinox_s():
    table = eqx.nn.Embedding(10, 8, key=jax.random.key(0))
    quantized = QuantEmbedding(table, "int8")
    decoded = quantized.to_embedding()
    indices = jnp.array([3, -1, 12, -12])
    np.testing.assert_array_equal(
        jax.vmap(quantized)(indices), jax.vmap(decoded)(indices)
    )


def test_scalars():
    layer = eqx.nn.Linear("scalar", 4, key=jax.random.key(0))
    quantized = QuantLinear(layer, "int8")
    x = jnp.float32(2)
    np.testing.assert_allclose(quantized(x), quantized.to_linear()(x), rtol=1e-6)
    with pytest.raises(ValueError, match="x must be a scalar"):
        quantized(jnp.ones(2))


def share(model):
    return eqx.tree_at(lambda m: m.gate, model, model.lm_head)


class Subclass(eqx.nn.Linear):
    pass


WRONG = {
    "nothing to quantise": (
        lambda m: quantize_model([Subclass(64, 64, key=jax.random.key(0))]),
        "nothing to quantise in list",
    ),
    "quantised already": (
        lambda m: quantize_model(quantize_model(m)),
        "quantised already",
    ),
    "an idle rule": (lambda m: quantize_model(m, rules=[(["up"], "nf4")]), "up"),
    "a format": (lambda m: quantize_model(m, "nf5"), "nf5"),
    "a shared weight": (
        lambda m: quantize_model(share(m)),
        "gate.weight and lm_head.weight are the same array.*name gate in skip",
    ),
    "not quantised": (dequantize_model, "does not have quantised layers"),
    "no adapters": (merge_adapters, "does not have adapters"),
    "targets": (
        lambda m: add_adapters(m, key=jax.random.key(0), target_modules=["up"]),
        "selects no linear layer of Model: .*lm_head",
    ),
    "nothing quantised": (
        lambda m: add_adapters(m, key=jax.random.key(0)),
        "selects no quantised linear layer of Model: .*lm_head",
    ),
    "two adapters": (
        lambda m: add_adapters(
            add_adapters(quantize_model(m), key=jax.random.key(0)),
            key=jax.random.key(1),
        ),
        "Layers with adapters already: attention.*, gate",
    ),
    "a rank": (
        lambda m: add_adapters(quantize_model(m), 0, key=jax.random.key(0)),
        "r must be a positive int",
    ),
    "several rows": (
        lambda m: QuantEmbedding(m.embed, "int8")(jnp.arange(3)),
        "use jax.vmap",
    ),
}


def test_models_of_others():
    with pytest.raises(TypeError, match=r"modules, got dict; .* jaxbnb.quantize_tree"):
        quantize_model({"w": jnp.ones((64, 64))})


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_bad_inputs(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
