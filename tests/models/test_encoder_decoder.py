"""Encoder-decoders against transformers: tests/goldens/make_encoder_decoder.py."""

import dataclasses
import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb.finetune import fit, next_token_loss, perplexity
from jaxbnb.models import (
    DecoderConfig,
    EncoderDecoderConfig,
    EncoderDecoderLM,
    _pairs,
    convert_to_flax,
    generate,
    generate_stream,
    load_pretrained,
    resize_token_embeddings,
    save_pretrained,
)

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_encoder_decoder.py")))
FEATURES = jnp.asarray(made.FEATURES)
SOURCE, TARGET = (jnp.asarray(x, jnp.int32) for x in (made.SOURCE, made.TARGET))
MASK = jnp.asarray(made.MASK)
QUANT = jaxbnb.QuantConfig("nf4", block_size=16)


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(GOLDENS / "encoder_decoder.npz"))


@pytest.fixture(scope="module")
def save(goldens, tmp_path_factory):
    """``save(family)`` is a folder as transformers wrote it, made once."""
    folders = {}

    def save(family, seed=0):
        if (family, seed) not in folders:
            about = json.loads(goldens[f"{family}_json"].tobytes())
            folder = tmp_path_factory.mktemp(family)
            (folder / "config.json").write_text(json.dumps(about["config"]))
            tensors = {
                name: made.seeded_tensor(family, name, shape, seed)
                for name, shape in about["shapes"].items()
            }
            save_file(tensors, folder / "model.safetensors")
            folders[family, seed] = folder
        return folders[family, seed]

    return save


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@jax.jit(static_argnums=0)
def run(graphdef, state):
    model = nnx.merge(graphdef, state)
    source, options = get_source(model)
    return model(source, TARGET, **options)


def get_source(model):
    if model.config.num_mel_bins:
        return FEATURES, {}
    return SOURCE, {"attention_mask": MASK}


@jax.jit(static_argnums=(0, 2))
def run_cached(graphdef, state, dtype):
    """The same, three tokens at a time."""
    model = nnx.merge(graphdef, state)
    source, options = get_source(model)
    source = model.model.encode(source, **options)
    cache = model.model.make_cache(source, 12, dtype)

    def step(cache, tokens):
        hidden, cache = model.model(tokens, cache=cache)
        return cache, model.logits(hidden)

    _, parts = jax.lax.scan(step, cache, TARGET.reshape(2, 3, 3).swapaxes(0, 1))
    return parts.swapaxes(0, 1).reshape(2, 9, -1)


@pytest.mark.parametrize("family", made.FAMILIES)
def test_logits(goldens, save, family):
    model = nnx.split(load_pretrained(save(family)))
    want = goldens[f"{family}_logits"]
    assert error(run(*model), want) < 1e-4
    assert error(run_cached(*model, jnp.float32), want) < 1e-4


def test_an_int8_cache(goldens, save):
    """Keys of 8 features share an absmax: an error of 1/254 of the largest of each."""
    got = run_cached(*nnx.split(load_pretrained(save("mt5"))), jnp.int8)
    assert 1e-4 < error(got, goldens["mt5_logits"]) < 0.1


def test_long_texts_in_blocks(goldens, save, monkeypatch):
    """Four queries at a time: logits, and the gradients through them."""
    monkeypatch.setattr(_pairs, "DENSE_SCORES", 0)
    monkeypatch.setattr(_pairs, "_ROWS", 4)
    # Not the function above, which has been compiled in one block.
    graphdef, state = nnx.split(load_pretrained(save("mt5")))
    assert (
        error(
            jax.jit(run.__wrapped__, static_argnums=0)(graphdef, state),
            goldens["mt5_logits"],
        )
        < 1e-4
    )
    check_slope(goldens, save, "mt5", jax.jit(loss_and_slope, static_argnums=0))


def loss_and_slope(graphdef, state, direction):
    """The loss, and how it changes along a direction of all weights."""
    labels = jnp.asarray(made.LABELS, jnp.int32)

    def loss(state):
        model = nnx.merge(graphdef, state)
        tokens = jnp.concatenate(
            [model.shift_right(labels), jnp.where(labels < 0, 0, labels)[:, -1:]], 1
        )
        mask = jnp.pad(labels >= 0, [(0, 0), (1, 0)])
        source, options = get_source(model)
        return next_token_loss(
            model,
            tokens,
            mask=mask,
            source_ids=source,
            source_mask=options.get("attention_mask"),
        )

    loss, grads = jax.value_and_grad(loss)(state)
    return loss, sum(map(jnp.vdot, *map(jax.tree.leaves, (grads, direction))))


def check_slope(goldens, save, family, compute):
    graphdef, state = nnx.split(load_pretrained(save(family)))
    direction = nnx.state(load_pretrained(save(family, seed=1)))
    loss, slope = compute(graphdef, state, direction)
    np.testing.assert_allclose(loss, goldens[f"{family}_loss"], rtol=1e-5)
    np.testing.assert_allclose(slope, goldens[f"{family}_slope"], rtol=1e-4)


# A tied head that scales, a separate one, and audio.
@pytest.mark.parametrize("family", ["t5", "flan", "whisper"])
def test_gradients(goldens, save, family):
    check_slope(goldens, save, family, jax.jit(loss_and_slope, static_argnums=0))


def test_generate(goldens, save):
    model, want = load_pretrained(save("mt5")), goldens["mt5_tokens"]
    options = {"attention_mask": made.MASK, "eos_token_id": 1, "pad_token_id": 0}
    got = generate(model, made.SOURCE, 8, **options)
    np.testing.assert_array_equal(got, want)
    columns = [*generate_stream(model, made.SOURCE, 8, **options)]
    np.testing.assert_array_equal(np.stack(columns, 1), want)


def test_transcribe(goldens, save):
    model = load_pretrained(save("whisper"))
    options = {"eos_token_id": 1, "pad_token_id": 0}
    got = model.generate(FEATURES, 8, decoder_token_ids=made.FIRST, **options)
    np.testing.assert_array_equal(got, goldens["whisper_tokens"])
    with pytest.raises(ValueError, match=r"with .6, 20. after the first; got .2, 6, 1"):
        model.generate(FEATURES[..., :10], 8)
    with pytest.raises(ValueError, match="attention_mask is for tokens; features are"):
        model.generate(FEATURES, 8, attention_mask=made.MASK)
    with pytest.raises(ValueError, match="have 1 rows, the sources 2"):
        model.generate(FEATURES, 8, decoder_token_ids=made.FIRST[:1])
    with pytest.raises(ValueError, match="have 26 tokens; this model takes 1 to 24"):
        model.generate(FEATURES, 24, decoder_token_ids=made.FIRST)


def test_samples_follow_the_key(save):
    model = load_pretrained(save("mt5"))
    draw = [
        np.asarray(model.generate(made.SOURCE, 8, temperature=2.0, key=key, top_k=20))
        for key in map(jax.random.key, (0, 0, 1))
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


@pytest.mark.parametrize("family", ["flan", "whisper"])
def test_what_was_loaded_is_saved(save, family, tmp_path):
    folder = save(family)
    save_pretrained(load_pretrained(folder), tmp_path / "out", source=folder)
    got, want = (load_file(x / "model.safetensors") for x in (tmp_path / "out", folder))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert_same(load_pretrained(tmp_path / "out"), load_pretrained(folder))


def assert_same(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    assert_same_leaves(a, b)


def assert_same_leaves(a, b):
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (a, b))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_names_of_transformers_4(save, tmp_path):
    """It scales if it ties, and repeats the embedding."""
    folder = save("t5")
    fields = json.loads((folder / "config.json").read_text())
    del fields["scale_decoder_outputs"], fields["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_pretrained(tmp_path), load_pretrained(folder))
    config = EncoderDecoderConfig.from_huggingface(
        fields | {"tie_word_embeddings": False}
    )
    assert not config.scales_head


def test_an_untied_head(goldens, save, tmp_path):
    """It computes the same, here and after it was saved."""
    folder = save("t5")
    model = load_pretrained(folder)
    model.untie_head()
    save_pretrained(model, tmp_path / "out", source=folder)
    again = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    assert_same_leaves(again, model)
    assert error(run(*nnx.split(again)), goldens["t5_logits"]) < 1e-4


@pytest.mark.parametrize("quant", [QUANT, "llm_int8"])
def test_quantised(save, tmp_path, quant):
    folder = save("mt5")
    model, afterwards = load_pretrained(folder, quant=quant), load_pretrained(folder)
    names = jaxbnb.nnx.quantize_model(afterwards, quant)
    assert_same(model, afterwards)
    # Seven linear layers in the encoder, eleven in the decoder.
    assert len(names) == 18
    if quant is QUANT:
        convert_to_flax(folder, tmp_path / "flax", quant=quant)
        assert_same(load_pretrained(tmp_path / "flax"), model)
        jaxbnb.nnx.dequantize_model(afterwards)
        got, want = (run(*nnx.split(each)) for each in (model, afterwards))
        assert error(got, np.asarray(want)) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits(goldens, save, dtype):
    model = load_pretrained(save("mt5"), dtype=dtype)
    logits = run(*nnx.split(model))
    assert logits.dtype == jnp.float32
    want = goldens["mt5_logits"]
    # Some 40 roundings, of logits with this spread; softmax of scores that are not
    # scaled triples them.
    bound = 40 * float(jnp.finfo(dtype).eps) / 2 * 3
    assert np.std(np.asarray(logits) - want) < bound * want.std()


def test_fit(save, tmp_path):
    """LoRA over NF4 lowers the loss; the adapter is saved and loaded."""
    model = load_pretrained(save("t5"), quant=QUANT)
    fresh = nnx.clone(model)
    config = jaxbnb.lora.LoraConfig(r=2)
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    batch = {
        "input_ids": made.SOURCE,
        "attention_mask": made.MASK.astype(int),
        "labels": made.LABELS,
    }
    losses = fit(model, jaxbnb.adamw8bit(3e-2), [batch] * 6).losses
    assert losses[-1] < losses[0] - 0.05
    jaxbnb.lora.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (
        "base_model.model.decoder.block.1.layer.1.EncDecAttention.q.lora_A.weight"
        in tensors
    )
    jaxbnb.lora.load_adapter(fresh, tmp_path)
    got, want = (run(*nnx.split(each)) for each in (fresh, model))
    np.testing.assert_array_equal(got, want)


def test_adapters_of_audio_learn(save, tmp_path):
    """LoRA over NF4, from features; what it has learnt is saved."""
    model = load_pretrained(save("whisper"), quant=QUANT)
    jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(r=2), rngs=nnx.Rngs(0))
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def loss_and_slope(trained):
        def loss(trained):
            model = nnx.merge(graphdef, trained, frozen)
            return next_token_loss(model, TARGET, source_ids=FEATURES)

        return jax.value_and_grad(loss)(trained)

    first, grads = loss_and_slope(trained)
    trained = jax.tree.map(lambda x, g: x - 0.1 * jnp.sign(g), trained, grads)
    last, _ = loss_and_slope(trained)
    assert last < first - 0.01
    nnx.update(model, trained)
    jaxbnb.lora.save_adapter(model, tmp_path / "adapter")
    again = load_pretrained(save("whisper"), quant=QUANT)
    jaxbnb.lora.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(*(run(*nnx.split(x)) for x in (model, again)))


def test_buckets():
    """The first distance of bucket 8 + k is the one from 8 * 16^(k / 8) on."""
    buckets = _pairs.find_buckets(16, 128)
    np.testing.assert_array_equal(buckets[:9], range(9))
    first = np.searchsorted(buckets, np.arange(8, 16))
    np.testing.assert_array_equal(first, [8, 12, 16, 23, 32, 46, 64, 91])


FIELDS = {
    **{"model_type": "t5", "vocab_size": 41, "d_model": 32, "d_kv": 8, "d_ff": 48},
    **{"num_layers": 2, "num_heads": 4},
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, NotImplementedError, "'tanh' is not"),
        ({"feed_forward_proj": "a-b"}, NotImplementedError, "'a-b' is not"),
        ({"is_encoder_decoder": False}, NotImplementedError, "is_encoder_decoder"),
        ({"d_ff": None}, ValueError, "lacks .'d_ff'"),
        ({"decoder_start_token_id": 41}, ValueError, "from 0 to 40; got 41"),
        ({"relative_attention_num_buckets": 6}, ValueError, "multiple of 4"),
        ({"num_decoder_layers": 0}, ValueError, "num_decoder_layers must be"),
    ],
)
def test_bad_configs(changes, kind, message):
    with pytest.raises(kind, match=message):
        EncoderDecoderConfig.from_huggingface(FIELDS | changes)


def test_variants_of_a_decoder_are_refused():
    config = EncoderDecoderConfig.from_huggingface(FIELDS)
    decoder = dataclasses.replace(config.decoder, sliding_window=4)
    with pytest.raises(ValueError, match="sliding_window 4 is for a CausalLM"):
        dataclasses.replace(config, decoder=decoder)


def test_what_needs_a_decoder_says_so(save):
    folder = save("t5")
    fields = json.loads((folder / "config.json").read_text())
    with pytest.raises(NotImplementedError, match="'t5' is an encoder-decoder"):
        DecoderConfig.from_huggingface(fields)
    model = load_pretrained(folder)
    with pytest.raises(TypeError, match="a decoder such as CausalLM is needed"):
        perplexity(model, np.zeros((1, 4), np.int32))
    with pytest.raises(TypeError, match="must be a CausalLM; got EncoderDecoderLM"):
        resize_token_embeddings(model, 50)
    with pytest.raises(TypeError, match="an EncoderDecoderLM needs source_ids"):
        next_token_loss(model, TARGET)
    with pytest.raises(ValueError, match="needs a source: give source="):
        model.model(TARGET)
    with pytest.raises(ValueError, match=r"shape of its tokens, .2, 12.; got .2, 3."):
        model(SOURCE, TARGET, attention_mask=MASK[:, :3])
    with pytest.raises(ValueError, match=r"has .'input_ids'.; a batch of an encoder-"):
        fit(model, jaxbnb.adamw8bit(1e-2), [{"input_ids": made.SOURCE}], wrt=nnx.Param)
    assert isinstance(model, EncoderDecoderLM)
