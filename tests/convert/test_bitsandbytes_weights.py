"""Weights that bitsandbytes quantised, in and out, byte for byte."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb import convert
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, FP4, NF4

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
NAME = "model.layers.0.mlp.up_proj.weight"


def stored(quant_type, *, shape=(10, 128), nested=False, storage=np.uint8, state=()):
    """Random arrays under the keys that bitsandbytes writes."""
    rng = np.random.default_rng(0)
    size, blocks = int(np.prod(shape)), -(-int(np.prod(shape)) // 64)
    fields = {"quant_type": quant_type, "blocksize": 64, "dtype": "float16"}
    fields["shape"] = list(shape)
    packed = rng.integers(0, 256, (size + 1) // 2, np.uint8)
    found = {
        NAME: packed.view(storage).reshape(-1, 1),
        f"{NAME}.absmax": np.abs(rng.standard_normal(blocks)).astype(np.float32),
        f"{NAME}.quant_map": CODEBOOKS[quant_type],
    }
    if nested:
        found[f"{NAME}.absmax"] = rng.integers(0, 256, blocks, np.uint8)
        found[f"{NAME}.nested_absmax"] = np.ones(-(-blocks // 256), np.float32)
        found[f"{NAME}.nested_quant_map"] = DYNAMIC8_SIGNED
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        fields["nested_offset"] = 1.25
    text = json.dumps(fields | dict(state)).encode()
    found[f"{NAME}.quant_state.bitsandbytes__{quant_type}"] = np.frombuffer(
        text, np.uint8
    )
    return found


def decoded(found, quant_type, shape):
    """The definition, element by element in flat blocks of 64."""
    packed = found[NAME].reshape(-1).view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: np.prod(shape)]
    absmax = found[f"{NAME}.absmax"]
    if absmax.dtype == np.uint8:
        absmax = DYNAMIC8_SIGNED[absmax] * np.float32(1) + np.float32(1.25)
    values = CODEBOOKS[quant_type][codes] * np.repeat(absmax, 64)[: codes.size]
    return values.reshape(shape).astype(np.float16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [np.uint8, ml_dtypes.bfloat16, np.float32])
def test_4_bits_are_read_byte_for_byte(folder, quant_type, nested, storage):
    found = stored(quant_type, nested=nested, storage=storage)
    save_file(found | {"x": np.ones(3, np.float32)}, folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    assert dict(checkpoint.tensors) == {
        NAME: convert.TensorInfo((10, 128), np.dtype(np.float16)),
        "x": convert.TensorInfo((3,), np.dtype(np.float32)),
    }
    q = checkpoint.read_quantized(NAME)
    assert (q.shape, q.quant_type, q.double_quant) == ((128, 10), quant_type, nested)
    assert q.codes.tobytes() == found[NAME].tobytes()
    assert q.absmax.tobytes() == found[f"{NAME}.absmax"].tobytes()
    want = decoded(found, quant_type, (10, 128))
    np.testing.assert_array_equal(checkpoint.read(NAME), want)
    np.testing.assert_array_equal(jax.tree.map(np.asarray, q).dequantize(), want.T)
    assert checkpoint.nbytes == sum(array.nbytes for array in found.values()) + 12
    with pytest.raises(convert.MissingTensorError, match="tensors that are: 1"):
        checkpoint.read_quantized("x")


def test_blocks_across_the_ends_of_rows_are_decoded_only(folder):
    found = stored("nf4", shape=(3, 7))
    save_file(found, folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    want = decoded(found, "nf4", (3, 7))
    np.testing.assert_array_equal(checkpoint.read(NAME), want)
    with pytest.raises(NotImplementedError, match="across the ends of its rows"):
        checkpoint.read_quantized(NAME)


def test_8_bits_are_read_byte_for_byte(folder):
    rng = np.random.default_rng(0)
    module = NAME.removesuffix("weight")
    found = {
        NAME: rng.integers(-127, 128, (10, 33), np.int8),
        f"{module}SCB": np.abs(rng.standard_normal(10)).astype(np.float32),
        f"{module}weight_format": np.zeros((), np.uint8),
    }
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text('{"torch_dtype": "float32"}')
    checkpoint = convert.open_checkpoint(folder)
    assert list(checkpoint.tensors) == [NAME]
    q = checkpoint.read_quantized(NAME)
    assert (q.shape, q.quant_type) == ((33, 10), "llm_int8")
    np.testing.assert_array_equal(q.codes, found[NAME])
    want = found[NAME] * (found[f"{module}SCB"] / np.float32(127))[:, None]
    # One rounding of the quotient, one of the product.
    np.testing.assert_allclose(checkpoint.read(NAME), want, rtol=2**-22)
    save_file(
        found | {f"{module}weight_format": np.ones((), np.uint8)},
        folder / "model.safetensors",
    )
    with pytest.raises(
        NotImplementedError, match="weight_format 1; jaxbnb reads only 0"
    ):
        convert.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}.absmax": None}, "absmax is missing"),
        ({f"{NAME}.absmax": np.ones(19, np.float32)}, r"float32\[19\], not float32"),
        ({f"{NAME}.absmax": np.ones(20, np.float16)}, r"float16\[20\], not float32"),
        ({f"{NAME}.quant_map": np.ones(256, np.float32)}, r"not float32\[16\]"),
        ({NAME: np.ones((639, 1), np.uint8)}, "takes 640 bytes; the file has 639"),
        ({NAME: None}, "takes 640 bytes; the file has none"),
        ({"blocksize": 0}, "even blocksize"),
        ({"blocksize": 2**40}, "even blocksize"),
        ({"blocksize": 128}, r"float32\[20\], not float32\[10\]"),
        ({"shape": [10, -128]}, "a shape of one to four axes"),
        ({"shape": [2**40, 2**40]}, "incomplete"),
        ({"shape": None}, "a shape of one to four axes"),
        ({"dtype": "int8"}, "a dtype from"),
        ({"quant_type": "fp4"}, "must name quant_type 'nf4'"),
        ({"nested_offset": 1.0}, "jaxbnb reads 256"),
    ],
)
def test_arrays_that_contradict_the_state(folder, change, message):
    state = {key: value for key, value in change.items() if NAME not in key}
    found = stored("nf4", state=state) | {k: v for k, v in change.items() if NAME in k}
    found = {key: value for key, value in found.items() if value is not None}
    save_file(found, folder / "model.safetensors")
    with pytest.raises(convert.CheckpointError, match=message) as error:
        convert.open_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_another_codebook_is_not_ours(folder):
    found = stored("nf4") | {f"{NAME}.quant_map": FP4}
    save_file(found, folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    for read in (checkpoint.read, checkpoint.read_quantized):
        with pytest.raises(NotImplementedError, match="not bitsandbytes' own"):
            read(NAME)


def test_models_whose_weights_bitsandbytes_turns_round(folder):
    save_file(stored("nf4"), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(NotImplementedError, match="transposes the weights of a gpt2"):
        convert.open_checkpoint(folder)


@pytest.fixture
def source(folder):
    """Two linear layers, one not a multiple of a block; an embedding, a norm."""
    rng = np.random.default_rng(0)
    shapes = {
        NAME: (10, 128),
        "model.layers.0.mlp.down_proj.weight": (128, 10),
        "model.embed_tokens.weight": (8, 128),
        "model.norm.weight": (128,),
    }
    found = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy", "dtype": "float32"}')
    return folder


def test_what_is_quantised_and_what_is_reported(source, tmp_path):
    reports = []
    checkpoint = convert.convert_checkpoint(
        source,
        tmp_path / "out",
        quant=jaxbnb.QuantConfig("nf4", double_quant=True),
        dtype="bfloat16",
        report=reports.append,
    )
    assert checkpoint.quantized == {
        NAME: jaxbnb.QuantConfig(
            "nf4", double_quant=True, compute_dtype=ml_dtypes.bfloat16
        )
    }
    by_name = {report.name: report for report in reports}
    found = load_file(source / "model.safetensors")
    assert set(by_name) == set(found)
    values = found[NAME].astype(ml_dtypes.bfloat16)
    q = checkpoint.read_quantized(NAME)
    want = jaxbnb.quantize(values.T, "nf4", axis=-2, double_quant=True)
    for mine, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert q.dtype == ml_dtypes.bfloat16
    error = np.float32(values) - want.dequantize(np.float32).T
    sqnr = 10 * np.log10(np.sum(np.float32(values) ** 2) / np.sum(error**2))
    # A relative error of some 2**-20 of the sums, 1280 terms in float32.
    assert by_name[NAME].sqnr == pytest.approx(sqnr, abs=1e-4)
    note = by_name["model.layers.0.mlp.down_proj.weight"].note
    assert note == "rows of 10, not a multiple of 64"
    fields = checkpoint.config["quantization_config"]
    assert fields["bnb_4bit_compute_dtype"] == "bfloat16"
    assert fields["llm_int8_skip_modules"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.down_proj",
    ]
    planned = convert.plan_conversion(
        source, quant=jaxbnb.QuantConfig("nf4", double_quant=True), dtype="bfloat16"
    )
    assert [(p.name, p.nbytes) for p in planned] == [
        (r.name, r.nbytes) for r in reports
    ]
    assert sum(p.nbytes for p in planned) == checkpoint.nbytes


def test_a_dtype_decodes_and_none_copies(source, tmp_path):
    first = convert.convert_checkpoint(source, tmp_path / "q", quant="fp4")
    copy = convert.convert_checkpoint(tmp_path / "q", tmp_path / "copy")
    assert copy.config == first.config
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("q", "copy"))
    assert {k: v.tobytes() for k, v in a.items()} == {
        k: v.tobytes() for k, v in b.items()
    }
    whole = convert.convert_checkpoint(tmp_path / "q", tmp_path / "w", dtype="float32")
    assert whole.config == {"model_type": "toy", "dtype": "float32"}
    np.testing.assert_array_equal(whole.read(NAME), first.read(NAME))
    with pytest.raises(NotImplementedError, match="already quantised; to quantise it"):
        convert.convert_checkpoint(tmp_path / "q", tmp_path / "again", quant="nf4")


def test_formats_and_layers_that_cannot_be(source, tmp_path):
    for quant in ("int8", jaxbnb.QuantConfig("nf4", block_size=128)):
        with pytest.raises(ValueError, match="transformers has bitsandbytes' nf4"):
            convert.convert_checkpoint(source, tmp_path / "out", quant=quant)
    with pytest.raises(ValueError, match="has nothing to quantise"):
        convert.convert_checkpoint(source, tmp_path / "out", quant="nf4", skip=".*")
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        NotImplementedError, match="needs the weights of a gpt2 transposed"
    ):
        convert.convert_checkpoint(source, tmp_path / "out", quant="nf4")


def test_interrupted_while_quantising(source, tmp_path):
    def interrupt(done, total, name):
        if name == "model.norm.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert_checkpoint(
            source, tmp_path / "out", quant="nf4", progress=interrupt
        )
    reports = []
    convert.convert_checkpoint(
        source, tmp_path / "out", quant="nf4", report=reports.append
    )
    # The journal also holds the SQNR.
    assert next(r.sqnr for r in reports if r.name == NAME) > 15
    convert.convert_checkpoint(source, tmp_path / "whole", quant="nf4")
    for name in ("model.safetensors", "config.json"):
        both = [(tmp_path / n / name).read_bytes() for n in ("out", "whole")]
        assert both[0] == both[1]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Llama of transformers and its folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs") / "float32"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@jax.jit(static_argnums=0)
def logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("quant_type", "double_quant"),
    [("nf4", False), ("fp4", True), ("llm_int8", False)],
)
def test_transformers_and_bitsandbytes(theirs, tmp_path, quant_type, double_quant):
    """They load what we wrote and we what they wrote, and compute the same."""
    import torch
    import transformers

    tokens = torch.arange(12)[None]
    config = jaxbnb.QuantConfig(quant_type, double_quant=double_quant)
    convert.convert_checkpoint(theirs, tmp_path / "ours", quant=config)
    fields = transformers.BitsAndBytesConfig(**config.to_huggingface())
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(theirs, quantization_config=fields).save_pretrained(tmp_path / "theirs")
    ours, made = (
        load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert {k: (v.shape, v.dtype) for k, v in ours.items() if "state" not in k} == {
        k: (v.shape, v.dtype) for k, v in made.items() if "state" not in k
    }
    if (quant_type, double_quant) == ("nf4", False):
        for name, array in made.items():
            assert ours[name].tobytes().rstrip() == array.tobytes().rstrip(), name
    for name in ("ours", "theirs"):
        model = load(tmp_path / name)
        kind = "Linear8bitLt" if quant_type == "llm_int8" else "Linear4bit"
        assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
        # Its products on a CPU round inputs to 16 bits; the decoded weights are exact.
        with torch.no_grad():
            expected = model.dequantize()(tokens).logits.float().numpy()
        loaded = jaxbnb.load_pretrained(tmp_path / name)
        kernel = loaded.model.layers.layer.mlp.up_proj.kernel[...]
        key = "model.layers.1.mlp.up_proj.weight"
        held = ours if name == "ours" else made
        assert np.asarray(kernel.codes[1]).tobytes() == held[key].tobytes()
        jaxbnb.nnx.dequantize_model(loaded)
        got = logits(*nnx.split(loaded), tokens.numpy())
        # float32 sums of up to 192 products through two layers, of logits up to 1.
        np.testing.assert_allclose(got, expected, atol=1e-5)
