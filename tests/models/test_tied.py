"""Models that config.json says are tied, and what is stored of embedding and head."""

import dataclasses
import json
import pathlib
import runpy
import types
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb import convert
from jaxbnb.convert import CheckpointError
from jaxbnb.models import (
    DecoderConfig,
    convert_to_flax,
    load_pretrained,
    save_pretrained,
)
from jaxbnb.models._load_plan import prepare
from jaxbnb.models._names import torch_name
from jaxbnb.models.families import get_family

FILE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WARNING = r"lm_head\.weight differs from model\.embed_tokens\.weight, so the model gets"
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))


@pytest.fixture(scope="module")
def tied(toy):
    return toy.model(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def two(toy, tied, tmp_path_factory):
    """A folder that says that they are one, and holds two."""

    def change(tensors):
        tensors[HEAD] = 2 * tensors[EMBEDDING][::-1].copy()

    return toy.save(tied, tmp_path_factory.mktemp("two") / "toy", change=change)


def assert_both(model, tensors):
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.lm_head.kernel[...].T, tensors[HEAD])
    embedding = model.model.embed_tokens.embedding[...]
    np.testing.assert_array_equal(embedding, tensors[EMBEDDING])


def test_a_head_that_differs_is_kept(two):
    with pytest.warns(UserWarning, match=WARNING):
        model = load_pretrained(two)
    assert_both(model, load_file(two / FILE))


def test_a_head_that_differs_is_in_what_is_written(two, tmp_path):
    tensors = load_file(two / FILE)
    with pytest.warns(UserWarning, match=WARNING):
        convert_to_flax(two, tmp_path / "flax", quant="nf4")
    model = load_pretrained(tmp_path / "flax")
    assert_both(model, tensors)
    save_pretrained(model, tmp_path / "saved", source=two)
    assert not json.loads((tmp_path / "saved/config.json").read_text())[
        "tie_word_embeddings"
    ]
    assert_both(load_pretrained(tmp_path / "saved"), tensors)
    # bitsandbytes leaves heads alone, or quantises both layers' and heads' weights.
    for name, skip in (("q", None), ("head", ["embed_tokens"])):
        options = {} if skip is None else {"skip": skip}
        convert.convert_checkpoint(two, tmp_path / name, quant="nf4", **options)
        with pytest.warns(UserWarning, match=WARNING):
            model = load_pretrained(tmp_path / name)
        assert not model.config.tie_word_embeddings
        kind = nnx.Linear if skip is None else jaxbnb.nnx.QuantLinear
        assert type(model.lm_head) is kind


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_same_matrix_twice_is_tied(toy, tied, tmp_path, dtype):
    def change(tensors):
        # Exact in both dtypes.
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(np.float16).astype(np.float32)
        tensors[HEAD] = tensors[EMBEDDING].astype(dtype)

    model = load_pretrained(toy.save(tied, tmp_path / "toy", change=change))
    assert model.config.tie_word_embeddings
    assert model.lm_head is None


def test_an_embedding_by_the_name_of_the_head(toy, tied, tmp_path):
    def change(tensors):
        tensors[HEAD] = tensors.pop(EMBEDDING)

    folder = toy.save(tied, tmp_path / "toy", change=change)
    model = load_pretrained(folder)
    assert model.config.tie_word_embeddings
    np.testing.assert_array_equal(
        model.model.embed_tokens.embedding[...],
        tied.model.embed_tokens.embedding[...],
    )
    convert_to_flax(folder, tmp_path / "flax")
    again = load_pretrained(tmp_path / "flax")
    assert nnx.graphdef(again) == nnx.graphdef(model)


# The heads of GPT-J and CodeGen have a bias, so no embedding can be one.
@pytest.mark.parametrize("family", sorted({*made.FAMILIES} - {"gptj", "codegen"}))
def test_in_the_names_of_every_family(tmp_path, family):
    about = json.loads(np.load(GOLDENS / "families.npz")[f"{family}_json"].tobytes())
    fields = {**about["config"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    names = get_family(DecoderConfig.from_huggingface(fields))
    head = torch_name(("lm_head", "kernel"), (), names)
    path = ("model", "embed_tokens", "embedding")
    embedding = torch_name(path, (), names)
    whole = {n: np.zeros(shape, np.float16) for n, shape in about["shapes"].items()}
    matrix = np.ones(about["shapes"][embedding], np.float16)
    for stored, is_tied in (
        ({head: matrix}, True),
        ({embedding: matrix}, True),
        ({head: matrix, embedding: matrix}, True),
        ({head: matrix, embedding: 2 * matrix}, False),
    ):
        rest = {n: t for n, t in whole.items() if n not in (head, embedding)}
        save_file(rest | stored, tmp_path / FILE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = prepare(tmp_path, None, None)
        assert len(caught) == (not is_tied)
        assert plan.config.tie_word_embeddings == is_tied
        assert (head in plan.places) != is_tied
        scale = stored.get(embedding, matrix)
        np.testing.assert_array_equal(plan.checkpoint.read(embedding), scale)
    save_file(rest, tmp_path / FILE)
    with pytest.raises(convert.MissingTensorError, match=f"missing: {embedding}$"):
        prepare(tmp_path, None, None)


@pytest.mark.parametrize(
    ("outer", "inner", "is_tied"),
    [
        (None, None, True),
        (None, False, False),
        (True, False, True),
        (False, True, False),
    ],
)
def test_a_nested_config(tmp_path, outer, inner, is_tied):
    """The outer config of a Gemma 3 decides, as in transformers."""
    about = json.loads(np.load(GOLDENS / "families.npz")["gemma3_text_json"].tobytes())[
        "config"
    ]
    del about["tie_word_embeddings"]
    fields = {"model_type": "gemma3", "text_config": about}
    for part, value in ((fields, outer), (about, inner)):
        part |= {} if value is None else {"tie_word_embeddings": value}
    config = DecoderConfig.from_huggingface(fields)
    assert config.tie_word_embeddings is is_tied


def test_two_names_of_one_tensor(tmp_path):
    about = json.loads(np.load(GOLDENS / "families.npz")["gpt_neox_json"].tobytes())
    (tmp_path / "config.json").write_text(json.dumps(about["config"]))
    whole = {n: np.zeros(shape, np.float16) for n, shape in about["shapes"].items()}
    matrix = whole.pop("embed_out.weight", whole.pop("lm_head.weight", None))
    heads = {"embed_out.weight": matrix, "lm_head.weight": matrix}
    save_file(whole | heads, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"embed_out\.weight .* lm_head\.weight"):
        prepare(tmp_path, None, None)


@pytest.mark.peers
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_transformers_reads_the_same(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    made.toy(family, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(fields))
    names = get_family(DecoderConfig.from_huggingface(fields))
    head = torch_name(("lm_head", "kernel"), (), names)
    path = ("model", "embed_tokens", "embedding")
    embedding = torch_name(path, (), names)
    tensors = load_file(tmp_path / FILE)
    first = tensors.pop(embedding)
    tensors.pop(head, None)
    for stored in ({head: first}, {head: 2 * first, embedding: first}):
        save_file(tensors | stored, tmp_path / FILE, metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = load_pretrained(tmp_path)
        got = ours.model.embed_tokens.embedding[...]
        want = theirs.get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(got, want)
        got = got if ours.lm_head is None else ours.lm_head.kernel[...].T
        want = theirs.get_output_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(got, want)


def embedding_arrays(model):
    leaves = jax.tree.leaves(model.model.embed_tokens.embedding.get_value())
    return [np.asarray(leaf) for leaf in leaves]


@pytest.mark.parametrize("quant", [None, "int8"])
def test_an_adapter_of_the_head_leaves_the_embedding_alone(toy, quant):
    model = toy.model(tie_word_embeddings=True)
    if quant:
        rules = [(["embed_tokens"], jaxbnb.QuantConfig(quant))]
        jaxbnb.nnx.quantize_model(model, rules=rules, skip=".*")
    tokens = toy.tokens(2, 5)
    want = toy.run(model, tokens)
    before = embedding_arrays(model)
    config = jaxbnb.lora.LoraConfig(r=2, target_modules=["lm_head"])
    loftq = dataclasses.replace(config, init_lora_weights="loftq")
    with pytest.raises(ValueError, match="fits adapter and quantised weight"):
        jaxbnb.lora.add_adapter(model, loftq, rngs=nnx.Rngs(0))
    assert model.lm_head is None
    assert jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0)) == ["lm_head"]
    got = toy.run(model, tokens)
    # Sums of 64 products, each a rounding of 2^-24 of it or of the sum, in any order.
    bound = 64 * 2**-24 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * bound)
    jax.tree.map(np.testing.assert_array_equal, embedding_arrays(model), before)
    # With all layers, the head is not meant.
    other = toy.model(tie_word_embeddings=True)
    jaxbnb.lora.add_adapter(other, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(0))
    assert other.lm_head is None


def test_names_that_peft_leaves_in_a_merged_folder(toy, model, tmp_path):
    def change(tensors):
        for name in (HEAD, "model.layers.1.mlp.up_proj.weight"):
            wrapped = name.replace(".weight", ".base_layer.weight")
            tensors[wrapped] = tensors.pop(name)

    got = load_pretrained(toy.save(model, tmp_path / "toy", change=change))
    assert nnx.graphdef(got) == nnx.graphdef(model)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        theirs = got
        for part in path:
            theirs = getattr(theirs, part)
        np.testing.assert_array_equal(theirs.get_value(), variable.get_value())
