"""Encoders, encoder-decoders and readers of images on a mesh send codes only, too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.core import QuantizedArray, tree_nbytes
from jaxbnb.finetune import fit, next_token_loss
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    EncoderDecoderLM,
    EncoderModel,
    VisionLM,
    VisionLMConfig,
    generate,
)
from jaxbnb.nnx import quantize_model
from jaxbnb.planning import collective_bytes
from jaxbnb.sharding import shard_model, use_mesh

QUANT = jaxbnb.QuantConfig("nf4", block_size=128)
HIDDEN, ROWS, SEQ = 256, 8, 16
VISION = {"image_size": 16, "patch_size": 4, "num_channels": 3}
LAYERS = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 65,
}
CONFIGS = {
    "t5": {
        "vocab_size": 256,
        "d_model": HIDDEN,
        "d_kv": 32,
        "d_ff": 2 * HIDDEN,
        "num_layers": 4,
        "num_heads": 8,
        "tie_word_embeddings": False,
    },
    "whisper": {
        "vocab_size": 256,
        "d_model": HIDDEN,
        "num_mel_bins": 8,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "max_source_positions": SEQ,
        "max_target_positions": SEQ,
        **{
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (
                ("layers", 4),
                ("attention_heads", 8),
                ("ffn_dim", 2 * HIDDEN),
            )
        },
    },
    "bert": {**LAYERS, "architectures": ["BertForMaskedLM"]},
    "vit": {**LAYERS, **VISION, "architectures": ["ViTForImageClassification"]},
    "smolvlm": {
        "image_token_id": 3,
        "scale_factor": 1,
        "text_config": {**LAYERS, "num_key_value_heads": 8},
        "vision_config": {**LAYERS, **VISION, "num_hidden_layers": 1},
    },
}


def make_model(family):
    """Returns a model with random weights, and its loss."""
    fields = {"model_type": family, **CONFIGS[family]}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(4, 256, (ROWS, SEQ)), jnp.int32)
    pixels = jnp.asarray(rng.standard_normal((ROWS, 3, 16, 16)), jnp.float32)

    if family in ("t5", "whisper"):
        config = EncoderDecoderConfig.from_huggingface(fields)
        kind: type = EncoderDecoderLM
        features = jnp.asarray(rng.standard_normal((ROWS, 8, 2 * SEQ)), jnp.float32)
        inputs = tokens, tokens if family == "t5" else features

        def loss(model, tokens, source):
            return next_token_loss(model, tokens, source_ids=source, remat=True)

    elif family == "smolvlm":
        config, kind = VisionLMConfig.from_huggingface(fields), VisionLM
        inputs = jnp.full_like(tokens, config.image_token_id), pixels

        def loss(model, tokens, pixels):
            return next_token_loss(model.with_images(pixels), tokens, remat=True)

    else:
        config, kind = EncoderConfig.from_huggingface(fields), EncoderModel
        inputs = (pixels, tokens[:, 0] % 2) if family == "vit" else (tokens, tokens)

        def loss(model, inputs, labels):
            logits = model(inputs, remat=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

    def build():
        model = kind(config, rngs=nnx.Rngs(0))
        quantize_model(model, QUANT, skip=["lm_head", "head"])
        add_adapter(model, LoraConfig(r=1, target_modules=["q_proj"]), rngs=nnx.Rngs(1))
        return model

    def fill(x):
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, x.shape, np.uint8))
        return jnp.asarray(rng.standard_normal(x.shape) / 16, x.dtype)

    model = nnx.eval_shape(build)
    nnx.update(model, jax.tree.map(fill, nnx.state(model)))
    return model, loss, inputs


SLOW = "bert", "whisper"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in CONFIGS
    ],
)
def test_a_step_gathers_codes_only(make, family):
    """The loss and the gradients are those of one device."""
    model, loss, inputs = make_model(family)
    mesh = make.mesh(fsdp=8)

    def compile_step():
        graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

        def step(adapters, rest, *inputs):
            def compute(adapters):
                return loss(nnx.merge(graphdef, adapters, rest), *inputs)

            return jax.value_and_grad(compute)(adapters)

        arguments = adapters, rest, *inputs
        return jax.jit(step).lower(*arguments).compile(), arguments

    compiled, arguments = compile_step()
    want = compiled(*arguments)
    shard_model(model, mesh)
    inputs = jax.device_put(inputs, NamedSharding(mesh, P("fsdp")))
    with use_mesh(mesh):
        compiled, arguments = compile_step()
        got = compiled(*arguments)
    _, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    leaves = jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, QuantizedArray))
    quantized = [x for x in leaves if isinstance(x, QuantizedArray)]
    weights = sum(x.size for x in quantized)
    # Everything else at most once: the embedding, the head, and what reads images.
    others = tree_nbytes(leaves) - tree_nbytes(quantized)
    sent = sum(collective_bytes(compiled).values())
    # Codes twice, at 0.531 bytes; without constraints, 4 to 5 bytes a weight are sent.
    assert 1.0 < (sent - others) / weights < 1.3
    # Float32, summed in another order.
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_decoder_writes_and_learns(make):
    """The tokens of one device, and the losses of `fit`, from padded sources."""
    tokens = make.tokens(ROWS, 6)
    is_real = np.arange(6) < 3 + np.arange(ROWS)[:, None] % 4
    batch = {"input_ids": tokens, "attention_mask": is_real, "labels": tokens[:, :5]}
    results = []
    for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        model, _, _ = make_model("t5")
        if sizes:
            shard_model(model, make.mesh(**sizes))
        new = np.asarray(generate(model, tokens, 4, attention_mask=is_real))
        losses = fit(model, jaxbnb.adamw8bit(1e-3), [batch] * 3).losses
        results.append((new, losses))
    (want, want_losses), (got, losses) = results
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)


def run_on_explicit_axes(make, run):
    """Returns results on one device and on explicit axes, of ``run(shard, put)``."""
    want = run(lambda model: model, lambda x: x)
    mesh = make.mesh(AxisType.Explicit, data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):

        def shard(model):
            shard_model(model, mesh)
            return model

        got = run(shard, lambda x: jax.device_put(x, P(("data", "fsdp"))))
    return got, want


def assert_close(got, want):
    # Float32, summed in another order.
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def find_specs(tree):
    return [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in CONFIGS
    ],
)
def test_explicit_axes(make, family):
    """The loss and the gradients are those of one device; divisions stay."""

    def run(shard, put):
        model, loss, inputs = make_model(family)
        shard(model)
        inputs = jax.tree.map(put, inputs)
        before = find_specs(nnx.state(model))
        trained = nnx.DiffState(0, nnx.LoRAParam)
        step = nnx.jit(nnx.value_and_grad(loss, argnums=trained))
        value, grads = step(model, *inputs)
        assert find_specs(grads) == find_specs(nnx.state(model, nnx.LoRAParam))
        assert find_specs(nnx.state(model)) == before
        if family == "smolvlm":
            return value, grads
        others = (inputs[1], inputs[0])[: 1 + (family in ("t5", "whisper"))]
        first = others if len(others) == 2 else inputs[:1]
        logits = nnx.jit(lambda model, *inputs: model(*inputs))(model, *first)
        assert find_specs(logits)[0][:1] == find_specs(first[0])[0][:1]
        return value, grads, logits

    assert_close(*run_on_explicit_axes(make, run))


def test_decoding_by_hand_on_explicit_axes(make):
    """A source is encoded and read into a cache, which keeps the division of rows.

    There are as many rows as layers, which the cache has an axis for, too.
    """
    tokens = make.tokens(4, 6)
    is_real = np.arange(6) < 3 + np.arange(4)[:, None] % 4

    def run(shard, put):
        model, _, _ = make_model("t5")
        shard(model)
        inputs, mask = put(tokens), put(is_real)
        for call in (lambda f: f, jax.jit):
            source = call(lambda x, m: model.model.encode(x, attention_mask=m))(
                inputs, mask
            )
            cache = call(lambda s: model.model.make_cache(s, 5, jnp.float32))(source)
            before, results = find_specs(cache), []
            if isinstance(inputs, jax.Array):
                rows = find_specs(inputs)[0][0]
                assert before[0][:2] == (None, rows)
            decode = call(lambda x, c: model.model(x, cache=c))
            labels = call(model.shift_right)(inputs)
            for part in (labels[:, :3], labels[:, 3:5]):
                hidden, cache = decode(part, cache)
                assert find_specs(cache) == before
                results.append(call(model.logits)(hidden))
            results.append(call(lambda s, x: model.model(x, source=s))(source, labels))
        return results, np.asarray(generate(model, tokens, 2, attention_mask=is_real))

    assert_close(*run_on_explicit_axes(make, run))
