"""GGUF files that jaxbnb writes: read back, and run by llama.cpp."""

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb.cli import main
from jaxbnb.convert import load_tokenizer, open_checkpoint
from jaxbnb.models import convert_to_gguf, load_pretrained, plan_to_gguf
from jaxbnb.models._rope import rope_frequencies

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
GEMMA = {
    **made.SIZES,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}
made.FAMILIES |= {
    "llama": ("Llama", {**made.SIZES, **PLAIN}),
    "llama3": ("Llama", {**made.SIZES, "rope_parameters": made.LLAMA3}),
    "linear": ("Qwen2", {**made.SIZES, "rope_parameters": made.LINEAR}),
    "yarn": ("Qwen3", {**made.SIZES, "rope_parameters": made.YARN}),
    "smollm3": ("SmolLM3", {**made.SIZES, "num_hidden_layers": 5}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6}),
}
FAMILIES = (
    *("llama", "llama3", "mistral", "mixtral", "linear", "yarn", "qwen3", "smollm3"),
    *("gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom", "gpt_bigcode"),
)


def save_tokenizer(folder, vocab_size, eos="</s>"):
    """A byte-level BPE as GPT-2's, of ASCII only: every token is whole characters."""
    alphabet = [*"aeinorstl\u0120\u010a", *map(chr, range(33, 127))]
    alphabet = list(dict.fromkeys(alphabet))[: vocab_size * 2 // 3]
    pairs = [(a, b) for a in alphabet for b in alphabet if (a + b).isalpha()]
    pairs = pairs[: vocab_size - len(alphabet) - 1]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, pairs)])}
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = bytes_
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([eos])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"eos_token": eos, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(family)``: transformers' folder of a toy model, made once."""
    done = {}

    def make(family):
        if family not in done:
            done[family] = tmp_path_factory.mktemp(family)
            made.toy(family, done[family])
            save_tokenizer(done[family], 41)
        return done[family]

    return make


def compare(got, want):
    """Compares models that may say in other words how rope is scaled."""
    leaves = [dict(nnx.to_flat_state(nnx.state(model))) for model in (got, want)]
    assert leaves[0].keys() == leaves[1].keys()
    for path, leaf in leaves[1].items():
        # A norm of Gemma is rounded where 1 is added to it: half of 2^-23 below 2.
        atol = 2**-24 if "gemma" in want.config.model_type and "scale" in path else 0
        np.testing.assert_allclose(
            leaves[0][path], leaf, rtol=0, atol=atol, err_msg=str(path)
        )
    dim = want.config.rotary_dim or want.config.head_dim
    for length in (8, 64):
        rotations = [
            rope_frequencies(dim, c.rope_theta, c.rope_scaling, length)
            for c in (got.config, want.config)
        ]
        # Factors of rope are float32, and are divided once more: 2 roundings.
        np.testing.assert_allclose(*rotations, rtol=2**-22)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back(folders, tmp_path, family):
    folder, path = folders(family), tmp_path / "out.gguf"
    reports = []
    written = convert_to_gguf(folder, path, report=reports.append)
    assert written == sum(report.nbytes for report in reports)
    compare(load_pretrained(path), load_pretrained(folder))
    ours, theirs = load_tokenizer(path), load_tokenizer(folder)
    assert ours.encode("eras on</s>") == theirs.encode("eras on</s>")
    assert ours.stop_token_ids == theirs.stop_token_ids
    assert ours.chat_template == theirs.chat_template


SIZES = {**made.SIZES, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 280}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama with rows of whole blocks."""
    made.FAMILIES["wide"] = ("Llama", {**SIZES, **PLAIN, "eos_token_id": 279})
    folder = tmp_path_factory.mktemp("wide")
    made.toy("wide", folder)
    save_tokenizer(folder, 280)
    return folder


@pytest.mark.parametrize("quant", ["q8_0", "q5_1", "q4_0"])
def test_types_of_blocks(wide, tmp_path, quant):
    path = tmp_path / "out.gguf"
    assert main(["convert", str(wide), str(path), "--quant", quant, "--report"]) == 0
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == quant.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    name = "model.layers.1.mlp.down_proj.weight"
    exact = open_checkpoint(wide).read(name)
    stored = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[quant.upper()])
    want = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[quant.upper()])
    np.testing.assert_array_equal(open_checkpoint(path).read(name), want)
    assert [r.result for r in plan_to_gguf(wide, quant=quant)].count(quant.upper()) > 2


@pytest.mark.parametrize(
    ("quant", "dtype"), [(None, "float16"), ("q8_0", None), ("q4_0", None)]
)
def test_llama_cpp_writes_the_same_tokens(wide, tmp_path, quant, dtype):
    xllamacpp = pytest.importorskip("xllamacpp")
    path = tmp_path / "out.gguf"
    convert_to_gguf(wide, path, quant=quant, dtype=dtype)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 64, 1, False
    prompt = [5, 80, 33, 120, 7]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 24,
            "temperature": 0.0,
            "logprobs": 1,
        }
    )
    theirs = [t["id"] for t in answer["choices"][0]["logprobs"]["content"]]
    model = load_pretrained(path)
    if quant is None:
        ours = model.generate(
            jnp.asarray([prompt]), 24, eos_token_id=279, pad_token_id=279
        )
        assert theirs == ours[0].tolist()
    # With a quantised weight, llama.cpp rounds inputs to 8 bits in blocks of 32. This
    # is 0.6 % of a product, and 2 % after the 8 products on a path: 4 sigma.
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray([prompt + theirs])
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)
    logits = np.asarray(logits[0, len(prompt) - 1 : -1])
    gaps = logits.max(-1) - logits[np.arange(len(theirs)), theirs]
    assert len(theirs) == 24
    assert gaps.max() < 0.08 * logits.std()


def test_models_that_a_file_cannot_describe(folders, wide, tmp_path):
    path = tmp_path / "out.gguf"
    with pytest.raises(NotImplementedError, match="is a 'opt'; jaxbnb writes GGUF"):
        convert_to_gguf(folders("opt"), path)
    with pytest.raises(NotImplementedError, match="sliding_window 4; jaxbnb reads"):
        convert_to_gguf(folders("qwen2"), path)
    with pytest.raises(ValueError, match=r"got 'q4_k'\. .* llama-quantize FILE OUT"):
        convert_to_gguf(wide, path, quant="q4_k")
    with pytest.raises(ValueError, match="dtype must be None or one of"):
        convert_to_gguf(wide, path, dtype="int8")
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another name"):
        convert_to_gguf(wide, path)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
