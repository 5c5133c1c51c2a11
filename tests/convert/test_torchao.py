"""torchao's weights, from files that are written here by the layout of the docs."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxbnb import QuantConfig, convert
from jaxbnb.convert import _torchao_reader, safetensors_files

ROWS, SIZE = 6, 64
NAME = "model.layers.0.mlp.up_proj"
BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
DYNAMIC = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": PER_ROW,
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
    },
}


def write(folder, arrays, kind, **attributes):
    data = {"block_size": [1, SIZE], "dtype": BFLOAT16, **attributes}
    fields = {"_type": kind, "_data": data, "_tensor_data_names": [*arrays]}
    metadata = {
        "format": "pt",
        f"{NAME}.weight": json.dumps(fields),
        "tensor_names": json.dumps([f"{NAME}.weight"]),
    }
    named = {f"{NAME}._weight_{end}": array for end, array in arrays.items()}
    infos = {n: convert.TensorInfo(x.shape, x.dtype) for n, x in named.items()}
    header, starts = safetensors_files.layout(infos, metadata)
    body = b"".join(np.ascontiguousarray(named[name]).tobytes() for name in starts)
    (folder / "model.safetensors").write_bytes(header + body)
    config = {"model_type": "toy", "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw(groups=1, low=-128, high=128, dtype=np.int8):
    rng = np.random.default_rng(0)
    return {
        "qdata": rng.integers(low, high, (ROWS, SIZE)).astype(dtype),
        "scale": rng.random((ROWS, groups), np.float32),
        "zero_point": rng.integers(low // 2, high // 2, (ROWS, groups)).astype(dtype),
    }


def decode(arrays):
    """The definition, in float32 and then rounded to bfloat16."""
    each = SIZE // arrays["scale"].shape[1]
    codes = arrays["qdata"].astype(np.float32)
    if "zero_point" in arrays:
        codes -= np.repeat(arrays["zero_point"].astype(np.float32), each, axis=1)
    scales = np.repeat(arrays["scale"].astype(np.float32), each, axis=1)
    return (codes * scales).astype(ml_dtypes.bfloat16)


INT4 = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}}
CASES = {
    "int8": ("Int8Tensor", draw(), {}, "int8_scaled"),
    "int8, zero points": ("Int8Tensor", draw(), {}, "uint8"),
    "int8, inputs too": (
        "Int8Tensor",
        draw(),
        {"act_quant_kwargs": DYNAMIC},
        "llm_int8",
    ),
    "int4": (
        "IntxUnpackedToInt8Tensor",
        draw(2, -8, 8),
        {**INT4, "block_size": [1, 32]},
        "uint4",
    ),
    "int3": (
        "IntxUnpackedToInt8Tensor",
        draw(2, -4, 4),
        {
            "target_dtype": {"_type": "torch.dtype", "_data": "int3"},
            "block_size": [1, 32],
        },
        "uint8",
    ),
    "float8": ("Float8Tensor", draw(dtype=ml_dtypes.float8_e4m3fn), {}, "fp8_scaled"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_kept(case, folder):
    kind, arrays, attributes, quant_type = CASES[case]
    if quant_type == "fp8_scaled":
        arrays = {end: arrays[end] for end in ("qdata", "scale")}
    elif quant_type in ("int8_scaled", "llm_int8"):
        # Also symmetric weights have them.
        arrays = {**arrays, "zero_point": np.zeros((ROWS, 1), np.int8)}
    checkpoint = convert.open_checkpoint(write(folder, arrays, kind, **attributes))
    assert list(checkpoint.tensors) == [f"{NAME}.weight"]
    config = checkpoint.quantized[f"{NAME}.weight"]
    assert config.quant_type == quant_type
    want = decode(arrays)
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), want)
    kernel = checkpoint.read_quantized(f"{NAME}.weight").dequantize()
    # Decoded from llm_int8, a value may be rounded to a neighbour in bfloat16.
    rtol = 2**-8 if quant_type == "llm_int8" else 0
    got = np.asarray(kernel).T.astype(np.float32)
    np.testing.assert_allclose(got, want.astype(np.float32), rtol=rtol)
    if quant_type == "llm_int8":
        assert config == QuantConfig("llm_int8", outlier_threshold=0)


def test_the_page_has_what_is_read():
    page = Path(__file__).parents[2] / "docs" / "checkpoints_in.md"
    said = re.findall(r"^\| torchao \| `(\w+)`", page.read_text(), re.MULTILINE)
    assert {*said} == {*_torchao_reader._KINDS}


def test_other_layouts_are_named(folder):
    arrays, error = draw(), convert.UnsupportedCheckpointError
    with pytest.raises(error, match="is a 'Int4Tensor' of torchao; jaxbnb reads"):
        convert.open_checkpoint(write(folder, arrays, "Int4Tensor"))
    scaled = {**arrays, "act_pre_scale": np.ones(SIZE, np.float32)}
    with pytest.raises(error, match="has an act_pre_scale, which multiplies"):
        convert.open_checkpoint(write(folder, scaled, "Int8Tensor"))


@pytest.mark.parametrize(
    ("changes", "attributes", "match"),
    [
        ({"scale": np.ones((ROWS, 2), np.float32)}, {}, "_weight_scale' must be "),
        ({"zero_point": np.ones(ROWS, np.int32)}, {}, "_weight_zero_point' must be"),
        ({}, {"block_size": [1, 48]}, r"needs a block_size that .* got \[1, 48\]"),
        ({}, {"block_size": 64}, "needs a block_size that .* got 64"),
    ],
)
def test_arrays_that_contradict(folder, changes, attributes, match):
    write(folder, draw() | changes, "Int8Tensor", **attributes)
    with pytest.raises(convert.CheckpointError, match=match):
        convert.open_checkpoint(folder)


def test_codes_that_do_not_fit(folder):
    write(folder, draw(1, -9, 8), "IntxUnpackedToInt8Tensor", **INT4)
    checkpoint = convert.open_checkpoint(folder)
    with pytest.raises(convert.CheckpointError, match="has a qdata that 4 bits do not"):
        checkpoint.read(f"{NAME}.weight")


def test_metadata_of_another_file(folder):
    write(folder, draw(), "Int8Tensor")
    path = folder / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b'up_proj.weight":', b'up_proj.WEIGHT":')
    )
    with pytest.raises(convert.CheckpointError, match=r"do not describe .*up_proj\.w"):
        convert.open_checkpoint(folder)


def test_it_is_copied_with_its_metadata(folder, tmp_path):
    _, arrays, attributes, _ = CASES["int4"]
    source = convert.open_checkpoint(
        write(folder, arrays, "IntxUnpackedToInt8Tensor", **attributes)
    )
    copy = convert.convert_checkpoint(folder, tmp_path / "copy")
    assert copy.quantized == source.quantized
    decoded = convert.convert_checkpoint(folder, tmp_path / "new", dtype="bfloat16")
    assert not decoded.quantized
    assert "quantization_config" not in decoded.config
    for other in (copy, decoded):
        (name,) = other.tensors
        np.testing.assert_array_equal(other.read(name), source.read(name))
