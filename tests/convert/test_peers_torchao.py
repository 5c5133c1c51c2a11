"""Weights that torchao writes, against what it decodes itself, bit for bit."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxbnb import convert

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
torchao = pytest.importorskip("torchao")

ROWS, SIZE = 48, 128
CASES = {
    "int8": ("Int8WeightOnlyConfig", {"version": 2}, "int8_scaled"),
    "int8, inputs too": (
        "Int8DynamicActivationInt8WeightConfig",
        {"version": 2},
        "llm_int8",
    ),
    "int4": ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}, "uint4"),
    "float8": ("Float8WeightOnlyConfig", {"version": 2}, "fp8_scaled"),
}


@pytest.mark.parametrize("case", CASES)
def test_torchao(case, tmp_path):
    from safetensors.torch import save_file
    from torchao import quantization
    from torchao.prototype.safetensors import safetensors_support

    name, options, quant_type = CASES[case]
    if quant_type == "uint4":
        options = {**options, "granularity": quantization.PerGroup(32)}
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(SIZE, ROWS, dtype=torch.bfloat16))
    quantization.quantize_(module, getattr(quantization, name)(**options))
    tensors, metadata = safetensors_support.flatten_tensor_state_dict(
        module.state_dict()
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    config = {"model_type": "toy", "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = convert.open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"0.weight", "0.bias"}
    assert checkpoint.quantized["0.weight"].quant_type == quant_type
    want = module[0].weight.dequantize().detach()
    assert want.dtype == torch.bfloat16
    bits = want.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(checkpoint.read("0.weight"), bits)
