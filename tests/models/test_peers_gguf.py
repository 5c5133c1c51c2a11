"""GGUF files of every architecture, written as llama.cpp's conversion writes them.

Names are those of the gguf package; what is done to the tensors is spelled out here.
"""

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxbnb.convert import convert_checkpoint
from jaxbnb.models import load_pretrained
from jaxbnb.models._rope import rope_frequencies

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))

# What files have no fields for is left as transformers has it by default.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
GEMMA = {**made.SIZES, "head_dim": 256, "sliding_window": 4}
made.FAMILIES |= {
    "llama": ("Llama", {**made.SIZES, **PLAIN}),
    "mixtral": ("Mixtral", {**made.FAMILIES["mixtral"][1], **PLAIN}),
    "smollm3": ("SmolLM3", {**made.SIZES, "num_hidden_layers": 5}),
    "qwen2": ("Qwen2", {**made.SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**made.SIZES, "head_dim": 128}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6}),
    "phi3": ("Phi3", {**made.SIZES, "sliding_window": None}),
    "gpt2": ("GPT2", {**made.MULTI_HEAD, "max_position_embeddings": 1024}),
    "gpt_bigcode": ("GPTBigCode", made.GPT2_LIKE),
    "llama_with_biases": ("Llama", {**made.SIZES, "attention_bias": True}),
    "llama3": ("Llama", {**made.SIZES, "rope_parameters": made.LLAMA3}),
    "yarn": ("Qwen3", {**made.SIZES, "rope_parameters": made.YARN}),
    "linear": ("Qwen2", {**made.SIZES, "rope_parameters": made.LINEAR}),
    "longrope": made.FAMILIES["phi3"],
}
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mixtral", "llama_with_biases", "llama3"), "LLAMA"),
    "smollm3": "SMOLLM3",
    **dict.fromkeys(("qwen2", "linear"), "QWEN2"),
    **dict.fromkeys(("qwen3", "yarn"), "QWEN3"),
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    **dict.fromkeys(("phi3", "longrope"), "PHI3"),
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
    "bloom": "BLOOM",
    "gpt_bigcode": "STARCODER",
}
SCALED = ("llama3", "yarn", "linear", "longrope")
READ_BY_TRANSFORMERS = (
    *("gemma2", "gemma3_text", "gpt2", "llama", "phi3", "qwen2", "qwen3"),
)


def add_metadata(writer, config):
    """What a ``config.json`` says."""
    get = config.get
    heads = get("num_attention_heads", get("n_head"))
    kind = config["model_type"]
    hidden = get("hidden_size", get("n_embd"))
    positions = get("max_position_embeddings", get("n_positions", 2048))
    writer.add_context_length(positions)
    writer.add_embedding_length(hidden)
    writer.add_block_count(get("num_hidden_layers", get("n_layer")))
    inner = "n_inner" if kind in ("gpt2", "gpt_bigcode") else "intermediate_size"
    writer.add_feed_forward_length(get(inner) or 4 * hidden)
    writer.add_head_count(heads)
    if kind == "gpt_bigcode":
        writer.add_head_count_kv(1)
    if kind not in ("gpt2", "gpt_neox", "bloom", "gpt_bigcode"):
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(get("layer_norm_epsilon", get("layer_norm_eps")))
    head_dim = get("head_dim") or hidden // heads
    if get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope:
        part = rope.get("partial_rotary_factor", get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(int(part * head_dim))
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope.get("rope_type") == "longrope":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config["max_position_embeddings"] / original
        factor = (1 + np.log(scale) / np.log(original)) ** 0.5
        writer.add_rope_scaling_attn_factors(float(factor))
        for kind in ("long", "short"):
            factors = np.float32(rope[f"{kind}_factor"])
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if "gemma" in config["model_type"] or config["model_type"] == "phi3":
        writer.add_sliding_window(get("sliding_window") or 0)
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config["model_type"] == "mixtral":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "gpt_neox":
        writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_pad_token_id(0)
    # transformers counts tokens by this list.
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])


def llama3_factors(rope, head_dim):
    """What each frequency is divided by, by its wavelength."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.float32(factors)


def stored(name, tensor, config):
    """A tensor as the conversion leaves it."""
    kind = config["model_type"]
    heads = config.get("num_attention_heads", config.get("n_head"))
    if kind in ("llama", "mixtral", "smollm3"):
        for part, count in (("q", heads), ("k", config["num_key_value_heads"])):
            if f"{part}_proj" in name:
                halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if "gemma" in kind and name.endswith("norm.weight"):
        tensor = tensor + 1
    if kind == "gpt2" and ("c_" in name and name.endswith("weight")):
        tensor = tensor.T
    if "query_key_value" in name:
        parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        tensor = parts.swapaxes(0, 1).reshape(tensor.shape)
    return np.ascontiguousarray(tensor, np.float32)


def write_gguf(folder, path, architecture, *, stack_experts=True):
    config = json.loads((folder / "config.json").read_text())
    kind = gguf.MODEL_ARCH[architecture]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[kind])
    add_metadata(writer, config)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(kind, layers)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(layers if config["model_type"] == "mixtral" else 0):
        for w, module in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            start = f"model.layers.{layer}.block_sparse_moe.experts"
            experts = [tensors.pop(f"{start}.{e}.{w}.weight") for e in range(4)]
            if stack_experts:
                name = f"layers.{layer}.feed_forward.experts.{w}.weight"
                tensors[name] = np.stack(experts)
                continue
            for e, expert in enumerate(experts):
                writer.add_tensor(f"blk.{layer}.ffn_{module}.{e}.weight", expert)
    for name, tensor in tensors.items():
        # The conversion of BLOOM leaves this out.
        bare = name.removeprefix("transformer.") if architecture == "BLOOM" else name
        new = names.get_name(bare, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        writer.add_tensor(new, stored(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``files(family)``: Hugging Face's folder and the GGUF file of it, made once."""
    done = {}

    def make(family):
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            made.toy(family, folder)
            path = folder / "model.gguf"
            write_gguf(folder, path, ARCHITECTURES[family])
            done[family] = folder, path
        return done[family]

    return make


def assert_same(got, want):
    leaves = [dict(nnx.to_flat_state(nnx.state(model))) for model in (got, want)]
    assert leaves[0].keys() == leaves[1].keys()
    for path, leaf in leaves[1].items():
        # A norm of Gemma is rounded where 1 is added to it: half of 2^-23 below 2.
        atol = 2**-24 if "gemma" in want.config.model_type and "scale" in path else 0
        np.testing.assert_allclose(
            leaves[0][path], leaf, rtol=0, atol=atol, err_msg=str(path)
        )


@pytest.mark.parametrize("family", [f for f in ARCHITECTURES if f not in SCALED])
def test_the_model_is_hugging_faces(files, family):
    folder, path = files(family)
    got, want = load_pretrained(path), load_pretrained(folder)
    assert got.config == want.config
    assert_same(got, want)


def test_experts_one_by_one(files, tmp_path):
    folder, path = files("mixtral")
    old = tmp_path / "old.gguf"
    write_gguf(folder, old, "LLAMA", stack_experts=False)
    assert_same(load_pretrained(old), load_pretrained(path))


@pytest.mark.parametrize("family", SCALED)
def test_scaled_rope(files, family):
    folder, path = files(family)
    got, want = load_pretrained(path).config, load_pretrained(folder).config
    assert got.rope_theta == want.rope_theta
    assert got.rotary_dim == want.rotary_dim
    dim = want.rotary_dim or want.head_dim
    for length in (8, 64):
        of_files = [
            rope_frequencies(dim, c.rope_theta, c.rope_scaling, length)
            for c in (got, want)
        ]
        # Files have float32.
        np.testing.assert_allclose(*of_files, rtol=2**-23)
    factors = [c.rope_scaling.attention_factor for c in (got, want)]
    np.testing.assert_allclose(*factors, rtol=2**-23)


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_logits_of_transformers(files, family):
    _, path = files(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(made.TOKENS)).logits.numpy()
    graphdef, state = nnx.split(load_pretrained(path))
    tokens = jnp.asarray(made.TOKENS, jnp.int32)
    got = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_a_folder_for_transformers(files, tmp_path, family):
    """Those that transformers does not read from GGUF, as converted to its form."""
    folder, path = files(family)
    convert_checkpoint(path, tmp_path / "out")
    logits = []
    for where in (tmp_path / "out", folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(where).eval()
        with torch.no_grad():
            logits.append(model(torch.tensor(made.TOKENS)).logits.numpy())
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
