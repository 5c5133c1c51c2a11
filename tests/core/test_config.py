import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from jaxbnb import QuantConfig
from jaxbnb.core import formats


def test_defaults():
    config = QuantConfig()
    assert dataclasses.astuple(config) == ("nf4", 64, False, None, None, None)
    llm_int8 = QuantConfig("llm_int8")
    assert dataclasses.astuple(llm_int8) == ("llm_int8", None, False, None, 6.0, None)


def test_it_is_a_value():
    assert QuantConfig("fp4", compute_dtype=jnp.bfloat16) == QuantConfig(
        "fp4", compute_dtype=jnp.bfloat16
    )
    assert len({QuantConfig(), QuantConfig("nf4"), QuantConfig("int8")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().block_size = 128


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16", "bfloat16", float])
def test_compute_dtypes(dtype):
    assert QuantConfig(compute_dtype=dtype).compute_dtype == dtype


def test_the_error_lists_what_weights_may_have():
    """Every format that it lists is taken, and the one that is not is not listed."""
    with pytest.raises(ValueError, match="quant_type 'int3' is not known") as caught:
        QuantConfig("int3")
    listed = re.findall(r"'(\w+)'", str(caught.value).partition("choose one of")[2])
    assert [QuantConfig(name).quant_type for name in listed] == listed
    assert {*formats.CODEBOOKS} - {*listed} == {formats.UNSIGNED}


def test_validation():
    with pytest.raises(ValueError, match="quant_type 'int3' is not known"):
        QuantConfig("int3")
    with pytest.raises(ValueError, match="positive even int, commonly 64; got 63"):
        QuantConfig(block_size=63)
    with pytest.raises(TypeError, match="compute_dtype must be floating, got int8"):
        QuantConfig(compute_dtype=jnp.int8)
    with pytest.raises(TypeError, match="compute_dtype must be a dtype, got 'bf17'"):
        QuantConfig(compute_dtype="bf17")
    with pytest.raises(ValueError, match=r"quant_type \['nf4'\] is not known"):
        QuantConfig(["nf4"])
    with pytest.raises(ValueError, match=r"act_quant_type must be one of .* got \[\]"):
        QuantConfig("fp8_e4m3", act_quant_type=[])
    with pytest.raises(ValueError, match="llm_int8 has one absmax for a whole row"):
        QuantConfig("llm_int8", double_quant=True)
    with pytest.raises(ValueError, match="takes no block_size"):
        QuantConfig("llm_int8", 64)
    with pytest.raises(ValueError, match="outlier_threshold is for llm_int8 alone"):
        QuantConfig("int8", outlier_threshold=6.0)
    with pytest.raises(ValueError, match=r"act_quant_type must be one of \['fp8_e4m3'"):
        QuantConfig("fp8_e4m3", act_quant_type="int8")
    with pytest.raises(
        ValueError, match="multiplies fp8 by fp8, so quant_type must be"
    ):
        QuantConfig("nf4", act_quant_type="fp8_e4m3")
    with pytest.raises(
        ValueError, match=r"a whole row has one absmax.*leave block_size"
    ):
        QuantConfig("fp8_e4m3", 64, act_quant_type="fp8_e4m3")


@pytest.mark.parametrize("double_quant", [False, True])
def test_fp8_products_have_one_absmax_for_a_row(double_quant):
    config = QuantConfig(
        "fp8_e5m2", double_quant=double_quant, act_quant_type="fp8_e4m3"
    )
    assert config.block_size is None
    q = config.quantize_kernel(jnp.ones((3, 129, 6)))
    assert (q.absmax.shape, q.axis, q.block_size) == ((3, 6, 1), -2, 130)
    q = config.quantize_embedding(jnp.ones((5, 64)))
    assert (q.absmax.shape, q.axis, q.double_quant) == ((5, 1), -1, double_quant)


@pytest.mark.parametrize("shape", [(128, 6), (3, 128, 6)])
def test_a_kernel_is_blocked_along_the_axis_that_products_sum_over(shape):
    config = QuantConfig("fp4", block_size=32, double_quant=True)
    q = config.quantize_kernel(jnp.ones(shape, jnp.bfloat16))
    assert (q.quant_type, q.block_size, q.double_quant) == ("fp4", 32, True)
    assert (q.axis, q.axis_size, q.shape) == (-2, 128, shape)
    assert q.dtype == jnp.bfloat16
    assert q.absmax.shape == (*shape[:-2], 6, 4)


CONFIGS = [
    QuantConfig(),
    QuantConfig("fp4", 128, double_quant=True, compute_dtype=jnp.bfloat16),
    QuantConfig("int8", compute_dtype="float16"),
    QuantConfig("llm_int8", outlier_threshold=4.5),
    QuantConfig("fp8_e4m3", act_quant_type="fp8_e5m2"),
    QuantConfig("llm_int8", outlier_threshold=0, compute_dtype=jnp.bfloat16),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_through_json(config):
    text = json.dumps(config.to_dict())
    assert QuantConfig.from_dict(json.loads(text)) == config


def test_from_dict():
    assert QuantConfig.from_dict({}) == QuantConfig()
    assert QuantConfig.from_dict({"quant_type": "llm_int8"}).outlier_threshold == 6.0
    with pytest.raises(ValueError, match=r"QuantConfig has no \['bits'\]; its fields"):
        QuantConfig.from_dict({"bits": 4})


def test_dtypes_of_one_name_are_one_config():
    assert len({QuantConfig(compute_dtype=d) for d in ("bfloat16", jnp.bfloat16)}) == 1


HUGGINGFACE = [
    (QuantConfig("nf4", compute_dtype="float32"), None, {"bnb_4bit_quant_type": "nf4"}),
    (
        QuantConfig("fp4", double_quant=True, compute_dtype="bfloat16"),
        ["lm_head", "embed"],
        {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    (QuantConfig("llm_int8"), None, {}),
    (
        QuantConfig("llm_int8", outlier_threshold=0.0),
        ["lm_head"],
        {"llm_int8_threshold": 0.0},
    ),
]


@pytest.mark.parametrize(("config", "skip", "values"), HUGGINGFACE)
def test_huggingface(config, skip, values):
    bits = 8 if config.quant_type == "llm_int8" else 4
    values = {**values, f"load_in_{bits}bit": True, "llm_int8_skip_modules": skip}
    # A file has only some of the fields; `to_huggingface` writes all of them.
    assert QuantConfig.from_huggingface(values) == (config, skip)
    written = config.to_huggingface(skip)
    assert written.items() >= values.items()
    assert QuantConfig.from_huggingface(json.loads(json.dumps(written))) == (
        config,
        skip,
    )


@pytest.mark.peers
@pytest.mark.parametrize(("config", "skip", "values"), HUGGINGFACE)
def test_huggingface_is_what_transformers_writes(config, skip, values):
    transformers = pytest.importorskip("transformers")
    bits = 8 if config.quant_type == "llm_int8" else 4
    theirs = transformers.BitsAndBytesConfig(
        **values, **{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skip
    ).to_dict()
    # Two keys are private attributes that repeat two others.
    theirs = {key: value for key, value in theirs.items() if key[0] != "_"}
    assert config.to_huggingface(skip) == json.loads(json.dumps(theirs))
    assert QuantConfig.from_huggingface(theirs) == (config, skip)


def test_huggingface_has_no_compute_dtype_of_the_input():
    """transformers' default is float32."""
    written = QuantConfig("nf4").to_huggingface()
    assert written["bnb_4bit_compute_dtype"] == "float32"


def test_huggingface_refusals():
    for config in (QuantConfig("int8"), QuantConfig("nf4", 128)):
        with pytest.raises(
            ValueError, match="in blocks of 64, and llm_int8; it cannot"
        ):
            config.to_huggingface()
    read = QuantConfig.from_huggingface
    with pytest.raises(NotImplementedError, match="quantised by 'gptq'"):
        read({"quant_method": "gptq", "bits": 4})
    with pytest.raises(NotImplementedError, match="keeps the weights in 16 bits"):
        read({"load_in_8bit": True, "llm_int8_has_fp16_weight": True})
    for both in (True, False):
        with pytest.raises(ValueError, match="one of load_in_4bit and load_in_8bit"):
            read({"load_in_4bit": both, "load_in_8bit": both})
    with pytest.raises(
        ValueError, match=r"must be one of \['nf4', 'fp4'\]; got 'int8'"
    ):
        read({"load_in_4bit": True, "bnb_4bit_quant_type": "int8"})
    with pytest.raises(ValueError, match="outlier_threshold must be positive"):
        read({"load_in_8bit": True, "llm_int8_threshold": -1.0})
