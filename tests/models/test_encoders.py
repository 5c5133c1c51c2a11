"""Encoders against transformers: tests/goldens/make_encoders.py."""

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb.finetune import perplexity
from jaxbnb.models import (
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    convert_to_flax,
    load_pretrained,
    save_pretrained,
)

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_encoders.py")))
QUANT = jaxbnb.QuantConfig("nf4", block_size=16)


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(GOLDENS / "encoders.npz"))


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


def call(model):
    if model.config.num_channels:
        return model(jnp.asarray(made.PIXELS))
    types = made.TYPES if model.config.num_token_types == 2 else None
    return model(
        jnp.asarray(made.TOKENS, jnp.int32),
        attention_mask=jnp.asarray(made.MASK),
        token_type_ids=None if types is None else jnp.asarray(types, jnp.int32),
    )


@jax.jit(static_argnums=0)
def run(graphdef, state):
    return call(nnx.merge(graphdef, state))


def error(got, want):
    got, want = (np.asarray(x) for x in (got, want))
    if want.ndim == 3:
        got, want = got[made.MASK], want[made.MASK]
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("family", made.FAMILIES)
def test_logits(goldens, save, family):
    logits = run(*nnx.split(load_pretrained(save(family))))
    assert error(logits, goldens[f"{family}_logits"]) < 1e-5


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_gradients(goldens, save, family):
    graphdef, state = nnx.split(load_pretrained(save(family)))
    direction = nnx.state(load_pretrained(save(family, seed=1)))

    @jax.jit
    def slope(state, direction):
        grads = jax.grad(lambda state: class_loss(nnx.merge(graphdef, state)))(state)
        return sum(map(jnp.vdot, *map(jax.tree.leaves, (grads, direction))))

    got = slope(state, direction)
    np.testing.assert_allclose(got, goldens[f"{family}_slope"], rtol=1e-4)


def class_loss(model):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        call(model), jnp.asarray(made.LABELS, jnp.int32)
    )
    return jnp.mean(losses)


@pytest.mark.parametrize("family", ["bert_tokens", "deit"])
def test_quantised_and_saved(goldens, save, tmp_path, family):
    folder = save(family)
    plain, model = load_pretrained(folder), load_pretrained(folder, quant=QUANT)
    afterwards = nnx.clone(plain)
    names = jaxbnb.nnx.quantize_model(afterwards, QUANT, skip=["head.out_proj"])
    assert_same(model, afterwards)
    assert len(names) == (7 if family == "bert_tokens" else 6)
    convert_to_flax(folder, tmp_path / "flax", quant=QUANT)
    assert_same(load_pretrained(tmp_path / "flax"), model)
    save_pretrained(plain, tmp_path / "out", source=folder)
    got, want = (load_file(x / "model.safetensors") for x in (tmp_path / "out", folder))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def assert_same(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (a, b))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_first_names_of_bert(save, tmp_path):
    """With the heads of pretraining, which are left out."""
    folder = save("bert_tokens")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = embedding
    tensors["bert.pooler.dense.bias"] = np.zeros(32, np.float32)
    tensors["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same(load_pretrained(tmp_path), load_pretrained(folder))


@pytest.mark.parametrize("family", ["roberta_tokens", "vit"])
def test_a_new_head_and_adapters_learn(save, family):
    """LoRA over NF4, and a new head, also in place of the vocabulary's."""
    model = load_pretrained(save(family), quant=QUANT)
    model.replace_head(3, rngs=nnx.Rngs(0))
    config = jaxbnb.lora.LoraConfig(r=2, modules_to_save=["head"])
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tx = jaxbnb.adamw8bit(1e-2)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            return class_loss(nnx.merge(graphdef, trained, frozen))

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = tx.init(trained), []
    for _ in range(5):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1


FIELDS = {
    **{"model_type": "bert", "vocab_size": 41, "hidden_size": 32},
    **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"architectures": ["BertForMaskedLM"]},
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"architectures": ["BertModel"]}, NotImplementedError, "BertModel.* end in"),
        ({"architectures": None}, NotImplementedError, "architectures .. are not"),
        ({"is_decoder": True}, NotImplementedError, "is_decoder True is not"),
        (
            {"position_embedding_type": "relative_key"},
            NotImplementedError,
            "position_embedding_type 'relative_key' is not",
        ),
        ({"hidden_act": "mish"}, NotImplementedError, "hidden_act 'mish' is not"),
        ({"num_labels": 0}, ValueError, "num_labels must be an int from 1"),
        ({"hidden_size": None}, ValueError, "lacks .'hidden_size'"),
        ({"model_type": "vit", "patch_size": 0}, ValueError, "patch_size must be one"),
        (
            {
                **{"model_type": "vit", "image_size": 8, "patch_size": 16},
                "architectures": ["ViTForImageClassification"],
            },
            ValueError,
            r"image_size .* at least patch_size",
        ),
        (
            {"model_type": "llama"},
            NotImplementedError,
            "kind decoder, not an",
        ),
    ],
)
def test_bad_configs(changes, kind, message):
    with pytest.raises(kind, match=message):
        EncoderConfig.from_huggingface(FIELDS | changes)


def test_what_does_not_fit_says_so(save):
    fields = json.loads((save("bert") / "config.json").read_text())
    with pytest.raises(NotImplementedError, match="'bert' is an encoder, which"):
        DecoderConfig.from_huggingface(fields)
    with pytest.raises(NotImplementedError, match="kind encoder, not an enc"):
        EncoderDecoderConfig.from_huggingface(fields)
    text, image = load_pretrained(save("bert")), load_pretrained(save("vit"))
    tokens = jnp.asarray(made.TOKENS, jnp.int32)
    with pytest.raises(ValueError, match="token_type_ids must have the shape"):
        text(tokens, token_type_ids=tokens[:, :3])
    with pytest.raises(ValueError, match="there are 36 tokens; this model takes 1 to"):
        text(jnp.tile(tokens, 3))
    with pytest.raises(ValueError, match=r".3, 12, 8. after the first; got .2, 12"):
        image(jnp.asarray(made.PIXELS).transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match="are for tokens, and this model takes images"):
        image(jnp.asarray(made.PIXELS), attention_mask=tokens > 0)
    with pytest.raises(TypeError, match="must be a language model"):
        perplexity(text, made.TOKENS)
