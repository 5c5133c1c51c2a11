"""merge and unmerge, and what preparing a model for training does to it."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb import QuantConfig
from jaxbnb.lora import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    merge,
    prepare_for_training,
    set_adapter,
    unmerge,
)
from jaxbnb.models import Llama, LlamaConfig
from jaxbnb.nnx import LayerStack, QuantLinear, dequantize_model, quantize_model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make(quant_type=None, dtype=jnp.float32, **options):
    """Makes two layers; the adapter's names may leave one of them alone."""
    linear = lambda seed: nnx.Linear(  # noqa: E731
        64, 24, param_dtype=dtype, rngs=nnx.Rngs(seed)
    )
    model = nnx.Dict(a=linear(0), b=linear(1))
    if quant_type:
        quantize_model(model, QuantConfig(quant_type))
    options = {"r": 4, "init_lora_weights": False, **options}
    add_adapter(model, LoraConfig(**options), rngs=nnx.Rngs(1))
    return model


X = normal((5, 64))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_in_float32_nothing_is_lost(use_dora):
    model = make(use_dora=use_dora, target_modules=["a"])
    add_adapter(
        model,
        LoraConfig(r=2, init_lora_weights=False, target_modules=["a", "b"]),
        name="other",
        rngs=nnx.Rngs(3),
    )
    set_adapter(model, ["default", "other"])
    want, alone = model["a"](X), model["b"](X)
    merged = merge(model)
    assert type(model["a"]) is type(model["b"]) is nnx.Linear
    # Sums of 64 products, none above 4 in all, and the weights' own rounding.
    np.testing.assert_allclose(model["a"](X), want, rtol=0, atol=64 * 4 * 2**-24)
    np.testing.assert_allclose(model["b"](X), alone, rtol=0, atol=64 * 4 * 2**-24)
    assert merged.sqnr == {"a": math.inf, "b": math.inf}


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_what_quantising_again_costs(quant_type):
    model = make(quant_type)
    layer = model["a"]
    change = np.asarray(layer.adapters["default"].change(jnp.zeros((64, 24))))
    exact = np.asarray(layer.base.kernel[...].dequantize()) + change
    before = jax.tree.map(np.asarray, nnx.state(model))
    want = model["a"](X)
    merged = merge(model)
    assert type(model["a"]) is QuantLinear
    stored = np.asarray(model["a"].kernel[...].dequantize(), np.float64)
    noise = np.sum((stored - exact) ** 2)
    sqnr = 10 * math.log10(np.sum(np.float64(exact) ** 2) / noise)
    assert merged.sqnr["a"] == pytest.approx(sqnr, abs=1e-3)
    assert f"{min(merged.sqnr.values()):.2f} dB" in str(merged)
    kept = np.vdot(stored - (exact - change), change) / np.vdot(change, change)
    assert merged.kept["a"] == pytest.approx(kept, abs=1e-5)
    assert f"{min(merged.kept.values()):.0%}, in " in str(merged)
    # The rounding of a normal weight: 20 dB and 44 dB, by FACTS of the formats.
    assert abs(merged.sqnr["a"] - {"nf4": 20.5, "int8": 44.0}[quant_type]) < 2
    # What the merged layer computes differs by that noise and no more.
    error = np.linalg.norm(model["a"](X) - want) / np.linalg.norm(want)
    assert error < 2 * 10 ** (-sqnr / 20)
    unmerge(model, merged)
    assert model["a"] is layer
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_a_small_update_is_lost_in_4_bits_and_not_after_decoding():
    kept = {}
    for decode in (False, True):
        model = make("nf4", target_modules=["a"])
        adapter = model["a"].adapters["default"]
        # Levels are 0.08 of an absmax apart at least, and this update is a thousandth.
        adapter.lora_b[...] = 1e-3 * adapter.lora_b[...]
        if decode:
            dequantize_model(model)
        merged = merge(model)
        kept[decode] = merged.kept["a"]
        assert ("merge_calibrated keeps more" in str(merged)) is not decode
    assert abs(kept[False]) < 0.1
    # The sum of float32 weights rounds each element by 2^-24 of it.
    assert kept[True] == pytest.approx(1, abs=1e-3)


def test_merged_layers_are_measured_again():
    model = make("nf4", target_modules=["a"])
    plain = make("nf4", target_modules=["a"])
    dequantize_model(model)
    merged = merge(model)
    quantize_model(model, "nf4")
    again = merged.measure(model)
    want = merge(plain)
    # The same sums, rounded to the same levels.
    assert again.kept == pytest.approx(want.kept, abs=1e-5)
    assert again.sqnr == pytest.approx(want.sqnr, abs=1e-3)
    unmerge(model, again)
    assert type(model["a"]) is LoraLinear
    with pytest.raises(ValueError, match="Dict has no merged layer at a; give the"):
        again.measure(nnx.Dict(b=nnx.Linear(64, 24, rngs=nnx.Rngs(0))))


def test_a_stack_is_told_layer_by_layer():
    model = LayerStack(lambda rngs: nnx.Linear(64, 8, rngs=rngs), 2, rngs=nnx.Rngs(0))
    model = nnx.Dict(layers=model, shared=None)
    quantize_model(model)
    options = {"r": 2, "init_lora_weights": False, "target_modules": ["layers.1"]}
    add_adapter(model, LoraConfig(**options), rngs=nnx.Rngs(0))
    merged = merge(model)
    assert list(merged.sqnr) == ["layers.0", "layers.1"]
    # The first layer has no adapter: the same weight has the same codes.
    assert merged.sqnr["layers.0"] == math.inf
    assert merged.kept["layers.0"] == 1.0
    assert 15 < merged.sqnr["layers.1"] < 25


def test_a_layer_in_two_places_stays_one():
    shared = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    model = nnx.Dict(a=nnx.Dict(x=shared), b=nnx.Dict(x=shared))
    add_adapter(model, LoraConfig(r=2), rngs=nnx.Rngs(0))
    merged = merge(model)
    assert model["a"]["x"] is model["b"]["x"]
    unmerge(model, merged)
    assert model["a"]["x"] is model["b"]["x"]
    assert type(model["b"]["x"]) is LoraLinear


@pytest.mark.parametrize(
    ("dtype", "value", "match"),
    [
        (jnp.float32, np.inf, r"b: .* \('default',\) added is not finite as float32"),
        (jnp.float16, 1e7, "not finite as float16; .* or it needs a wider dtype"),
    ],
)
def test_a_sum_that_is_not_finite(dtype, value, match):
    model = make(dtype=dtype)
    model["b"].adapters["default"].lora_b[...] = jnp.full((4, 24), value)
    graphdef = nnx.graphdef(model)
    kernel = np.asarray(model["a"].base.kernel[...])
    with pytest.raises(ValueError, match=match):
        merge(model)
    assert nnx.graphdef(model) == graphdef
    np.testing.assert_array_equal(model["a"].base.kernel[...], kernel)


def test_a_sharded_weight_stays_where_it_is():
    model, alone = make("int8"), make("int8")
    sharding = NamedSharding(
        Mesh(np.array(jax.devices()[:2]), ("model",)), PartitionSpec("model")
    )
    kernel = model["b"].base.kernel
    kernel.set_value(jax.tree.map(lambda x: jax.device_put(x, sharding), kernel[...]))
    got, want = merge(model), merge(alone)
    assert got.kept == pytest.approx(want.kept, abs=1e-5)
    for name in ("a", "b"):
        jax.tree.map(
            np.testing.assert_array_equal,
            model[name].kernel[...],
            alone[name].kernel[...],
        )
    assert model["b"].kernel[...].codes.sharding.is_equivalent_to(sharding, 2)


def test_nothing_to_merge():
    model = make()
    set_adapter(model, [])
    with pytest.raises(ValueError, match="Dict has no active adapters to merge"):
        merge(model)


def test_unmerging_something_else():
    model = make()
    merged = merge(model)
    with pytest.raises(ValueError, match="has nothing there: give what was merged"):
        unmerge(nnx.Dict(a=nnx.Linear(64, 24, rngs=nnx.Rngs(0))), merged)
    with pytest.raises(ValueError, match="Dict has LoraLinear there"):
        unmerge(make(), merged)
    unmerge(model, merged)


# --- QLoRA is LoRA over the decoded weight.


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_qlora_is_lora_over_the_decoded_weight(use_dora):
    """Equal up to rounding: a product of codes sums the same numbers."""
    model = make("nf4", use_dora=use_dora)
    want = {key: model[key](X) for key in "ab"}
    dequantize_model(model)
    for key in "ab":
        assert type(model[key].base) is nnx.Linear
        base = np.abs(X) @ np.abs(model[key].base.kernel[...])
        # Both sums of 64 products, and as many again through the adapter.
        bound = 2 * 128 * 2**-24 * float(jnp.max(base))
        np.testing.assert_allclose(model[key](X), want[key], rtol=0, atol=bound)


# --- prepare_for_training.


def llama():
    model = Llama(LlamaConfig(**SIZES), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    quantize_model(model, QuantConfig("int8", block_size=16))
    return model


def keep_all(*_, **__):
    return True


def test_prepared(caplog):
    model = llama()
    add_adapter(
        model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), rngs=nnx.Rngs(1)
    )
    with caplog.at_level(logging.INFO, "jaxbnb.lora"):
        prepared = prepare_for_training(model, remat=keep_all)
    assert prepared.dtypes == dict.fromkeys(
        [
            "lm_head.base.kernel",
            "model.layers.layer.input_layernorm.scale",
            "model.layers.layer.post_attention_layernorm.scale",
            "model.norm.scale",
        ],
        "bfloat16",
    )
    assert prepared.added_bytes == 2 * (16 * 32 + 5 * 16)
    assert caplog.messages == [str(prepared)]
    assert "remat=keep_all" in str(prepared)
    assert prepared.notes == ()
    assert (
        model.lm_head.base.kernel.dtype == model.model.norm.scale.dtype == jnp.float32
    )
    assert model.model.embed_tokens.embedding.dtype == jnp.bfloat16
    hidden = model.model(jnp.array([[1, 2]]))
    assert hidden.dtype == jnp.bfloat16
    assert model.lm_head(hidden).dtype == jnp.float32
    again = prepare_for_training(model, remat=True)
    assert (again.dtypes, again.added_bytes) == ({}, 0)


def test_remat_is_of_the_stack():
    """Whatever the call says; a policy says what is kept."""
    stack = LayerStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 2, rngs=nnx.Rngs(0))

    def loss(stack, x):
        return jnp.sum(stack(lambda layer, x, _: jnp.sin(layer(x)), x))

    def jaxpr():
        return str(jax.make_jaxpr(jax.grad(loss, 1))(stack, jnp.ones((3, 8))))

    assert "remat" not in jaxpr()
    prepared = prepare_for_training(stack, head=())
    assert prepared.remat == {"": True}
    assert "remat" in jaxpr()
    assert "policy=None" in jaxpr()
    prepare_for_training(stack, head=(), remat=keep_all)
    assert "keep_all" in jaxpr()
    prepare_for_training(stack, head=(), remat=False)
    assert "remat" not in jaxpr()


def test_what_is_left_as_it_is():
    model = nnx.Dict(lm_head=QuantLinear(64, 8, rngs=nnx.Rngs(0)))
    prepared = prepare_for_training(model, remat=False)
    assert prepared.notes == ("lm_head is nf4, and stays so",)
    prepared = prepare_for_training(nnx.Dict(), remat=False)
    assert "no output head ('lm_head',): it is the embedding" in str(prepared)
    with pytest.raises(
        ValueError, match=r"Dict has none; wrap its blocks in nnx\.remat"
    ):
        prepare_for_training(model)


def test_a_norm_gives_the_dtype_that_it_gave():
    model = nnx.Dict(norm=nnx.LayerNorm(8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = jnp.ones((2, 8), jnp.bfloat16)
    # Flax's own norms promote what strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        before = model["norm"](x).dtype
        prepare_for_training(model, head=(), remat=False)
        assert model["norm"].bias.dtype == jnp.float32
        assert model["norm"](x).dtype == before == jnp.bfloat16


class ScaleNorm(nnx.Module):
    """A model's own: its result is of the dtype of its input, or of all that it has."""

    def __init__(self, casts):
        self.weight = nnx.Param(jnp.ones(8, jnp.bfloat16))
        self.casts = casts

    def __call__(self, x):
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        weight = self.weight.astype(x.dtype) if self.casts else self.weight[...]
        return y * weight


class Normalizer(nnx.Module):
    """Named so, and none: it has parameters that a norm has not."""

    def __init__(self):
        self.mix = nnx.Param(jnp.ones((8, 8), jnp.bfloat16))
        self.shift = nnx.Param(jnp.ones(8, jnp.bfloat16))


def test_norms_that_are_none_of_flaxs():
    config = LlamaConfig(**SIZES, norm="rms_plus_one")
    model = nnx.Dict(
        decoder=Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        own=ScaleNorm(casts=True),
        promotes=ScaleNorm(casts=False),
        other=Normalizer(),
    )
    with jax.numpy_dtype_promotion("standard"):
        prepared = prepare_for_training(model, head=(), remat=False)
    layer = "decoder.model.layers.layer"
    assert set(prepared.dtypes) == {
        f"{layer}.input_layernorm.scale",
        f"{layer}.post_attention_layernorm.scale",
        "decoder.model.norm.scale",
        "own.weight",
    }
    assert prepared.notes == ("promotes is unchanged: ScaleNorm would give float32",)
