"""Models of KerasHub, at toy sizes, quantised by jaxbnb.keras."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

keras = pytest.importorskip("keras")
hub = pytest.importorskip("keras_hub")
jk = pytest.importorskip("jaxbnb.keras")

pytestmark = [
    pytest.mark.peers,
    # T5's attention is given a mask that it does not use.
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
]

WIDTH = 64
VOCABULARY = 64
LENGTH = 8

text = functools.partial(
    dict,
    vocabulary_size=VOCABULARY,
    num_layers=1,
    hidden_dim=WIDTH,
    intermediate_dim=2 * WIDTH,
)
image = functools.partial(
    dict, num_layers=1, num_heads=4, hidden_dim=WIDTH, image_shape=(32, 32, 3)
)


def make_blip2():
    from keras_hub.src.models.blip2 import blip2_custom_opt

    return hub.models.BLIP2Backbone(
        vision_encoder=hub.models.BLIP2VisionEncoder(
            image_size=32,
            patch_size=16,
            num_layers=1,
            num_heads=4,
            hidden_dim=WIDTH,
            intermediate_dim=128,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
        ),
        qformer=hub.models.BLIP2QFormer(
            num_query_tokens=4,
            num_layers=1,
            num_heads=4,
            hidden_dim=WIDTH,
            intermediate_dim=128,
            vision_dim=WIDTH,
            cross_attention_frequency=1,
            dropout=0.0,
            layer_norm_epsilon=1e-12,
        ),
        language_model=blip2_custom_opt.BLIP2CustomOPT(
            **text(num_heads=4),
            num_query_tokens=4,
            dropout=0.0,
            max_sequence_length=32,
            qformer_hidden_dim=WIDTH,
        ),
    )


MODELS = {
    "BLOOM": lambda: hub.models.BloomBackbone(**text(num_heads=4)),
    "Falcon": lambda: hub.models.FalconBackbone(**text(num_attention_heads=4)),
    "GPT-2": lambda: hub.models.GPT2Backbone(**text(num_heads=4)),
    "GPT-NeoX": lambda: hub.models.GPTNeoXBackbone(**text(num_heads=4)),
    "OPT": lambda: hub.models.OPTBackbone(**text(num_heads=4)),
    "T5": lambda: hub.models.T5Backbone(**text(num_heads=4)),
    "BART": lambda: hub.models.BartBackbone(**text(num_heads=4)),
    "Whisper": lambda: hub.models.WhisperBackbone(
        **text(num_heads=4), max_encoder_sequence_length=2 * LENGTH
    ),
    "BERT": lambda: hub.models.BertBackbone(**text(num_heads=4)),
    "RoBERTa": lambda: hub.models.RobertaBackbone(**text(num_heads=4)),
    "XLM-RoBERTa": lambda: hub.models.XLMRobertaBackbone(**text(num_heads=4)),
    "DeBERTa": lambda: hub.models.DebertaV3Backbone(**text(num_heads=4)),
    "ESM": lambda: hub.models.ESMBackbone(**text(num_heads=4)),
    "ViT": lambda: hub.models.ViTBackbone(**image(patch_size=16, mlp_dim=128)),
    "DeiT": lambda: hub.models.DeiTBackbone(
        **image(patch_size=16, intermediate_dim=128)
    ),
    "BLIP-2": make_blip2,
}


def make_inputs(model, rng):
    def make(spec):
        shape = [LENGTH if size is None else size for size in (2, *spec.shape[1:])]
        if spec.dtype != "int32":
            return rng.standard_normal(shape).astype(np.float32)
        if "mask" in spec.name or "segment" in spec.name:
            return np.ones(shape, np.int32)
        return rng.integers(0, VOCABULARY, shape).astype(np.int32)

    return jax.tree.map(make, model.input)


def compute(model, trainable, inputs):
    others = [variable.value for variable in model.non_trainable_variables]
    outputs, _ = model.stateless_call(trainable, others, inputs)
    return jax.tree.leaves(outputs)


def loss(model, inputs, trainable):
    """How far the outputs are from noise, and the outputs."""
    outputs = compute(model, trainable, inputs)
    keys = jax.random.split(jax.random.key(0), len(outputs))
    pairs = zip(outputs, keys, strict=True)
    error = sum(jnp.mean((y - jax.random.normal(k, y.shape)) ** 2) for y, k in pairs)
    return error, outputs


# The others are made of the same layers.
QUICK = ("Falcon", "T5", "ViT")
SLOW = [
    pytest.param(name, marks=pytest.mark.exhaustive)
    for name in MODELS
    if name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_4_bits(name, tmp_path):
    """Quantised layers compute what decoded ones do, and train; files hold them."""
    model = MODELS[name]()
    inputs = make_inputs(model, np.random.default_rng(0))
    layers = jk.quantize_model(model, "nf4")
    jk.add_adapters(model, r=4)
    # Embeddings, and the convolutions of images and sounds.
    assert all("embed" in path or "conv" in path for path in layers.left_alone)
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss, model, inputs), has_aux=True)
    )
    adapters = [variable.value for variable in model.trainable_variables]
    (before, outputs), grads = step(adapters)
    tx = optax.adam(1e-2)
    state = tx.init(adapters)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        adapters = optax.apply_updates(adapters, updates)
        (after, _), grads = step(adapters)
    assert after < before

    model.save_weights(tmp_path / "model.weights.h5")
    loaded = MODELS[name]()
    found = jk.load_weights(loaded, tmp_path / "model.weights.h5")
    assert sorted(found) == sorted(layers)
    jk.dequantize_model(loaded)
    values = [variable.value for variable in loaded.trainable_variables]
    decoded = jax.jit(functools.partial(compute, loaded))(values, inputs)
    for got, want in zip(outputs, decoded, strict=True):
        # Two layers of sums of 128 products, of order one: float32's rounding.
        np.testing.assert_allclose(got, want, rtol=0, atol=2 * 128 * 2**-24)


@pytest.mark.parametrize(
    ("name", "task", "texts"),
    [
        ("GPT-2", "GPT2CausalLM", [""]),
        ("BART", "BartSeq2SeqLM", ["encoder_", "decoder_"]),
        ("BLIP-2", "BLIP2CausalLM", [""]),
    ],
)
def test_generate(name, task, texts):
    """KerasHub's generate, with its cache, writes what the decoded weights do."""
    model = getattr(hub.models, task)(backbone=MODELS[name](), preprocessor=None)
    model.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    is_given = np.broadcast_to(np.arange(LENGTH) < 3, (2, LENGTH)).astype(np.int32)
    tokens = is_given * rng.integers(3, VOCABULARY, (2, LENGTH), np.int32)
    inputs = {
        f"{text}{name}": array
        for text in texts
        for name, array in (("token_ids", tokens), ("padding_mask", is_given))
    }
    if name == "BLIP-2":
        inputs["images"] = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
    jk.quantize_model(model, "nf4")
    got = model.generate(inputs, stop_token_ids=[1])[f"{texts[-1]}token_ids"]
    jk.dequantize_model(model)
    model.generate_function = None  # Keras compiles it anew.
    want = model.generate(inputs, stop_token_ids=[1])[f"{texts[-1]}token_ids"]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[:, :3], tokens[:, :3])
    assert (np.asarray(got)[:, 3] > 0).all()


def test_its_own_adapters_and_their_files(tmp_path):
    """KerasHub's enable_lora and save_lora_weights, over quantised layers."""
    model, other = MODELS["BLOOM"](), MODELS["BLOOM"]()
    path = str(tmp_path / "adapters.lora.h5")
    for each in (model, other):
        jk.quantize_model(each, "nf4")
        each.enable_lora(4)
    model.save_lora_weights(path)
    other.load_lora_weights(path)
    layers = [
        [layer for layer in each._flatten_layers() if hasattr(layer, "lora_kernel_a")]
        for each in (model, other)
    ]
    assert [layer.name for layer in layers[0]] == ["value_dense", "query_dense"]
    for one, two in zip(*layers, strict=True):
        np.testing.assert_array_equal(one.lora_kernel_a.value, two.lora_kernel_a.value)
