"""jaxbnb.keras: quantised layers, adapters and files of Keras models."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb

keras = pytest.importorskip("keras")

from jaxbnb.keras import (  # noqa: E402
    QuantDense,
    QuantEinsumDense,
    QuantEmbedding,
    QuantReversibleEmbedding,
    add_adapters,
    dequantize_model,
    load_model,
    load_weights,
    quantize_model,
)
from jaxbnb.keras._backend import import_keras  # noqa: E402

RULES = [(["embed"], "int8")]
LINEARS = [
    *(f"attention.{name}" for name in ("query", "key", "value", "attention_output")),
    *("up", "down"),
]


def make():
    """Tokens to logits, with a layer of each kind."""
    ids = keras.Input((8,), dtype="int32")
    embed = keras.layers.ReversibleEmbedding(64, 64, name="embed")
    x = embed(ids)
    x = x + keras.layers.Conv1D(64, 1, name="conv")(x)
    x = x + keras.layers.MultiHeadAttention(4, 16, name="attention")(x, x)
    y = keras.layers.LayerNormalization()(x)
    y = keras.layers.Dense(128, activation="gelu", name="up")(y)
    x = x + keras.layers.EinsumDense(
        "btf,fd->btd", output_shape=(None, 64), bias_axes="d", name="down"
    )(y)
    return keras.Model(ids, embed(x, reverse=True))


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 64, (2, 8)).astype(np.int32)


def run(model, ids):
    values = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    return jax.jit(lambda *args: model.stateless_call(*args)[0])(*values, ids)


def test_it_computes_what_decoded_weights_do(ids):
    model = make()
    kernel = model.get_layer("up").kernel.value
    report = quantize_model(model, "nf4", rules=RULES)
    assert sorted(report) == sorted([*LINEARS, "embed"])
    assert report.left_alone == {"conv.kernel": (1, 64, 64)}
    # 64 codes in 32 bytes and a float32 for each of 128 columns, and the bias.
    assert sum(v.value.nbytes for v in model.get_layer("up").variables) == 128 * 40
    got = run(model, ids)
    assert sorted(dequantize_model(model)) == sorted(report)
    want = jaxbnb.quantize(jnp.asarray(kernel), "nf4", axis=-2).dequantize()
    np.testing.assert_array_equal(model.get_layer("up").kernel.value, want)
    assert type(model.get_layer("attention").query_dense) is keras.layers.EinsumDense
    # Products of up to 128 terms of order one, six layers deep: float32's rounding.
    np.testing.assert_allclose(got, run(model, ids), rtol=0, atol=128 * 6 * 2**-24)


def test_fit_trains_adapters_alone(ids, tmp_path):
    """Keras's own fit, and its files with the adapters in them."""
    model = make()
    quantize_model(model, "nf4", rules=RULES)
    assert sorted(add_adapters(model, r=4, alpha=8)) == sorted(LINEARS)
    assert len(model.trainable_variables) == 2 * len(LINEARS)
    frozen = [np.asarray(v.value) for v in model.non_trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-2), loss=loss)
    losses = model.fit(ids, ids[:, ::-1], epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    for old, variable in zip(frozen, model.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, variable.value)

    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    assert isinstance(loaded.get_layer("attention").query_dense, QuantEinsumDense)
    assert_same_variables(loaded, model)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = make()
    assert sorted(load_weights(fresh, tmp_path / "model.weights.h5")) == sorted(
        [*LINEARS, "embed"]
    )
    assert_same_variables(fresh, model)

    got = run(model, ids)
    with pytest.raises(ValueError, match=r"Set model.optimizer = None"):
        dequantize_model(model)
    model.optimizer = None
    dequantize_model(model)
    model.save(tmp_path / "merged.keras")
    merged = keras.saving.load_model(tmp_path / "merged.keras", compile=False)
    # Products of up to 128 terms of order one, six layers deep: float32's rounding.
    np.testing.assert_allclose(run(merged, ids), got, rtol=0, atol=128 * 6 * 2**-24)


def assert_same_variables(model, other):
    assert len(model.variables) == len(other.variables)
    for one, two in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(one.value, two.value)


def test_keras_loads_models_of_such_layers_itself(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            keras.layers.Embedding(64, 32, name="embed"),
            keras.layers.Dense(64, name="up"),
            keras.layers.Dense(32, name="logits"),
        ],
        name="sequential",
    )
    config = jaxbnb.QuantConfig("fp4", double_quant=True, compute_dtype="bfloat16")
    assert quantize_model(model, config, rules=RULES) == [
        "sequential.embed",
        "sequential.up",
    ]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[0], QuantEmbedding)
    assert isinstance(loaded.layers[1], QuantDense)
    assert type(loaded.layers[2]) is keras.layers.Dense
    assert loaded.layers[1].config == config
    ids = np.arange(16).reshape(2, 8)
    np.testing.assert_array_equal(run(loaded, ids), run(model, ids))


@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btd,hd->bth", "ebd,edf->ebf"])
def test_adapters_of_an_einsum_are_keras_s(equation):
    """They compute what Keras does with the sum of the kernel and the update."""
    kernel = equation.split(",")[1].split("-")[0]
    sizes = {"e": 2, "d": 64, "n": 2, "h": 16, "f": 32, "b": 2, "t": 3}
    output = [sizes[label] for label in equation.split(">")[1]][1:]
    layer = QuantEinsumDense(equation, tuple(output), config="int8")
    x = np.random.default_rng(0).standard_normal(
        [sizes[label] for label in equation.split(",")[0]], np.float32
    )
    layer(x)
    layer.enable_lora(3, lora_alpha=6, b_initializer="ones")
    want = jnp.einsum(equation, x, layer.kernel)
    assert layer.kernel.shape == tuple(sizes[label] for label in kernel)
    update = 2 * layer.lora_kernel_a.value @ layer.lora_kernel_b.value
    assert float(jnp.max(jnp.abs(update))) > 0.1
    # Sums of 64 products of order one.
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=64 * 2**-21)


def test_an_untied_head_in_mixed_precision():
    policy = keras.DTypePolicy("mixed_bfloat16")
    arguments = dict(tie_weights=False, logit_soft_cap=5.0, mask_zero=True)
    layer = keras.layers.ReversibleEmbedding(64, 32, dtype=policy, **arguments)
    layer.build()
    quantize_model(layer, rules=[(r".*", "int8")])
    assert isinstance(layer, QuantReversibleEmbedding)
    rows = layer(np.arange(4))
    logits = layer(rows, reverse=True)
    assert (rows.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16)
    dequantize_model(layer)
    np.testing.assert_array_equal(rows, layer(np.arange(4)))
    # bfloat16's rounding of sums of 32 products.
    np.testing.assert_allclose(
        logits.astype(jnp.float32),
        layer(rows, reverse=True).astype(jnp.float32),
        rtol=2**-7,
        atol=2**-7,
    )


def make_linear(**kwargs):
    layers = [keras.Input((64,)), keras.layers.Dense(64, name="linear", **kwargs)]
    return keras.Sequential(layers)


def quantized(**kwargs):
    model = make_linear(**kwargs)
    quantize_model(model, "nf4")
    return model


def in_training():
    model = make_linear()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def quantized_by_keras():
    model = make_linear()
    model.get_layer("linear").quantize("int8")
    return model


def adapted_embedding():
    layer = keras.layers.Embedding(64, 64, name="embed")
    layer.build()
    layer.enable_lora(2)
    return layer


def in_another_format(tmp_path):
    quantized().save_weights(tmp_path / "model.weights.h5")
    model = make_linear()
    quantize_model(model, "int8")
    return load_weights(model, tmp_path / "model.weights.h5")


def not_a_file(tmp_path):
    (tmp_path / "model.keras").write_bytes(b"no zip")
    return load_model(tmp_path / "model.keras")


def with_assets(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({}))
        archive.writestr("assets/vocabulary.txt", "a b")
    return load_model(tmp_path / "model.keras")


WRONG = {
    "no model": (lambda _: quantize_model({}), TypeError, "takes a Keras model"),
    "quantised already": (
        lambda _: quantize_model(quantized()),
        ValueError,
        "quantised already: {'nf4': .*linear.*first, with dequantize_model",
    ),
    "by Keras": (
        lambda _: quantize_model(quantized_by_keras()),
        ValueError,
        "linear is quantised by Keras, to int8",
    ),
    "not built": (
        lambda _: quantize_model(keras.Sequential([keras.layers.Dense(4)])),
        ValueError,
        "is not built",
    ),
    "in training": (
        lambda _: quantize_model(in_training()),
        ValueError,
        "call quantize_model, and then model.compile",
    ),
    "an idle rule": (
        lambda _: quantize_model(make_linear(), rules=[(["up"], "nf4")]),
        ValueError,
        "decide over no layer",
    ),
    "an adapted embedding": (
        lambda _: quantize_model(adapted_embedding(), rules=RULES),
        NotImplementedError,
        "does not take adapters",
    ),
    "an einsum": (
        lambda _: QuantEinsumDense("abc,cd->ad", (4,)).build((2, 3, 4)),
        ValueError,
        "not a product with a quantised kernel",
    ),
    "not quantised": (
        lambda _: dequantize_model(make_linear()),
        ValueError,
        "does not have quantised layers",
    ),
    "a rank": (lambda _: add_adapters(quantized(), 0), ValueError, "r must be"),
    "targets": (
        lambda _: add_adapters(quantized(), target_modules=["up"]),
        ValueError,
        "selects no quantised linear layer; Sequential has .*linear",
    ),
    "two adapters": (
        lambda _: add_adapters(quantized(lora_rank=2)),
        ValueError,
        "have adapters already: .*linear",
    ),
    "another format": (in_another_format, ValueError, "jaxbnb.keras.load_weights"),
    "no .keras file": (not_a_file, ValueError, "not a .keras file"),
    "assets": (with_assets, NotImplementedError, "assets/vocabulary.txt"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_inputs(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_other_backends(monkeypatch):
    message = "needs Keras with the JAX backend, got {}: set .* KERAS_BACKEND=jax"
    with monkeypatch.context() as patch:
        patch.setattr(keras.backend, "backend", lambda: "torch")
        with pytest.raises(ImportError, match=message.format("torch")):
            import_keras()

    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr("jaxbnb.keras._backend.import_extra", fail)
    with pytest.raises(ImportError, match=message.format("tensorflow")):
        import_keras()
