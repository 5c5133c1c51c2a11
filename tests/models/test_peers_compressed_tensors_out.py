"""transformers and compressed-tensors load what is written for them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.convert import convert_checkpoint
from jaxbnb.models import load_pretrained, save_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

TOKENS = np.random.default_rng(0).integers(0, 89, (2, 9))
FORMATS = [
    QuantConfig("int4", 32),
    QuantConfig("uint4", 32),
    QuantConfig("llm_int8"),
    QuantConfig("fp8_e4m3", act_quant_type="fp8_e4m3"),
    QuantConfig("mxfp4"),
    QuantConfig("nvfp4"),
]


def names(quant):
    return quant.quant_type


def load(folder, **options):
    config = transformers.CompressedTensorsConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, attn_implementation="eager"
    ).eval()


def run(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def decoded_logits(toy, source, quant):
    """Logits of our model with the decoded weights, and so without rounded inputs."""
    model = load_pretrained(source, quant=quant)
    jaxbnb.nnx.dequantize_model(model)
    return toy.run(model, jnp.asarray(TOKENS))


@pytest.fixture(scope="module")
def source(toy, tmp_path_factory):
    return toy.save(toy.model(num_hidden_layers=2), tmp_path_factory.mktemp("m") / "s")


@pytest.mark.parametrize("quant", FORMATS, ids=names)
def test_transformers_loads_a_conversion(toy, source, tmp_path, quant):
    reports = []
    convert_checkpoint(
        source,
        tmp_path / "out",
        quant=quant,
        to="compressed-tensors",
        report=reports.append,
    )
    assert sum(report.is_quantized for report in reports) == 14
    theirs = load(tmp_path / "out", dequantize=True)
    want = decoded_logits(toy, source, quant)
    # The same weights in float32, except for the last bit of a scale.
    atol = 1e-5 * abs(want).max()
    if quant.quant_type == "nvfp4":
        # compressed-tensors decodes it in bfloat16: a scale and a product have errors
        # of 2^-9, and there are 8 layers on a path. 6 sigma.
        atol = 6 * 8**0.5 * 2**-9 * np.std(want)
    np.testing.assert_allclose(run(theirs), want, rtol=0, atol=atol)
    # Read back as they are stored, the weights are the same up to that bit.
    again = load_pretrained(tmp_path / "out")
    jaxbnb.nnx.dequantize_model(again)
    got = toy.run(again, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("quant", [FORMATS[0], FORMATS[2]], ids=names)
def test_transformers_loads_a_saved_model(toy, source, tmp_path, quant):
    model = load_pretrained(source, quant=quant)
    save_pretrained(model, tmp_path / "out", source=source, to="compressed-tensors")
    convert_checkpoint(source, tmp_path / "same", quant=quant, to="compressed-tensors")
    got, want = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "same"))
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    if quant.quant_type == "int4":
        # Weights stay compressed, and inputs are not rounded, as in ours.
        theirs, ours = run(load(tmp_path / "out")), toy.run(model, jnp.asarray(TOKENS))
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * abs(ours).max())


def test_formats_that_cannot_be_written(toy, source, tmp_path):
    for quant, message in (
        ("nf4", "cannot store nf4"),
        (QuantConfig("int4", double_quant=True), "int4, doubly quantised"),
        ("fp8_e4m3", "fp8_e4m3 rounds inputs"),
        (QuantConfig("int4", 2), "multiple of 8; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(
                source, tmp_path / "out", quant=quant, to="compressed-tensors"
            )
    with pytest.raises(ValueError, match=r"to must be one of .* got 'awq'"):
        convert_checkpoint(source, tmp_path / "out", quant="int4", to="awq")
    model = load_pretrained(source)
    with pytest.raises(ValueError, match="this model's are not quantised"):
        save_pretrained(model, tmp_path / "out", source=source, to="bitsandbytes")
    rules = [(["up_proj"], QuantConfig("int8"))]
    jaxbnb.nnx.quantize_model(model, "int4", rules=rules)
    with pytest.raises(ValueError, match=r"this model's are \['int4', 'int8'\]"):
        save_pretrained(model, tmp_path / "out", source=source, to="compressed-tensors")
    assert not (tmp_path / "out").exists()
    assert nnx.state(model)
