"""Checkpoints of other libraries, against what they decode themselves, bit for bit."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxbnb
from jaxbnb import convert

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
library = pytest.importorskip("compressed_tensors")

NAME = "model.layers.0.mlp.up_proj"
ROWS, SIZE = 48, 256


def to_numpy(x):
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def weight(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, SIZE, generator=generator).to(dtype)


def scheme_of(format_, inputs=None, **weights):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**weights)
    return QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=inputs, format=format_
    )


def calibrate(w, args):
    """Scales and zero points as llm-compressor's simplest observer has them."""
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    size = {"group": args.group_size, "tensor_group": args.group_size}
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = w.reshape(ROWS // rows, rows, SIZE // columns, columns)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif args.strategy == "tensor":
        low, high = w.min(), w.max()
    else:
        blocks = w.reshape(ROWS, -1, size.get(args.strategy, SIZE))
        low, high = blocks.amin(-1), blocks.amax(-1)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(w.min(), w.max())
    scale, zero = calculate_qparams(low, high, args, found.get("weight_global_scale"))
    return found | {"weight_scale": scale, "weight_zero_point": zero}


def save(folder, tensors, config):
    from safetensors.torch import save_file

    named = {f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(named, folder / "model.safetensors")
    fields = {"model_type": "llama", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(fields))
    return convert.open_checkpoint(folder)


CASES = {
    "pack-quantized group": dict(num_bits=4, strategy="group", group_size=128),
    "pack-quantized asymmetric": dict(
        num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "pack-quantized channel": dict(num_bits=4, strategy="channel"),
    "pack-quantized 8": dict(
        num_bits=8, strategy="group", group_size=64, symmetric=False
    ),
    "int-quantized channel": dict(num_bits=8, strategy="channel"),
    "int-quantized channel, W8A8": dict(num_bits=8, strategy="channel"),
    "naive-quantized asymmetric": dict(num_bits=8, strategy="channel", symmetric=False),
    "naive-quantized tensor": dict(num_bits=8, strategy="tensor"),
    "float-quantized tensor": dict(num_bits=8, type="float", strategy="tensor"),
    "float-quantized channel": dict(num_bits=8, type="float", strategy="channel"),
    "float-quantized block": dict(
        num_bits=8, type="float", strategy="block", block_structure=[16, 128]
    ),
    "nvfp4-pack-quantized": dict(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
    "mxfp4-pack-quantized": dict(
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    ),
}
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints_in.md"
# What the page says: the format of each case.
KEPT = dict(
    re.findall(
        r"^\| compressed-tensors \| `(.*?)`.* \| `(\w+)` \|$", PAGE.read_text(), re.M
    )
)


def test_the_page_has_a_row_for_each_case():
    assert set(KEPT) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors(case, tmp_path):
    from compressed_tensors.compressors.base import BaseCompressor

    format_ = case.partition(" ")[0]
    rounds_inputs = case.endswith("W8A8")
    inputs = dict(num_bits=8, strategy="token", dynamic=True) if rounds_inputs else None
    scheme = scheme_of(format_, inputs, **CASES[case])
    w = weight()
    compressor = BaseCompressor.get_value_from_registry(format_)
    stored = compressor.compress({"weight": w, **calibrate(w, scheme.weights)}, scheme)
    want = compressor.decompress(stored, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    checkpoint = save(tmp_path, stored, config)
    (name,) = checkpoint.tensors
    assert name == f"{NAME}.weight"
    assert checkpoint.quantized[name].quant_type == KEPT[case]
    info = checkpoint.tensors[name]
    assert (info.shape, info.dtype) == ((ROWS, SIZE), ml_dtypes.bfloat16)
    # The library computes in bfloat16 where its scales are; both round once.
    got = checkpoint.read(name)
    np.testing.assert_array_equal(got, to_numpy(want.to(torch.bfloat16)))
    kernel = checkpoint.read_quantized(name)
    assert kernel.shape == (SIZE, ROWS)
    decoded = np.asarray(kernel.dequantize(), np.float32).T
    # Codes over 127 times an absmax are rounded once more, perhaps to a neighbour.
    rtol = 2**-8 if rounds_inputs else 0
    np.testing.assert_allclose(decoded, got.astype(np.float32), rtol=rtol)


ENCODED = (
    *("pack-quantized group", "int-quantized channel", "float-quantized channel"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)


@pytest.mark.parametrize("case", ENCODED)
def test_quantize_chooses_the_same_scales_and_codes(case, tmp_path):
    from compressed_tensors.compressors.base import BaseCompressor

    format_ = case.partition(" ")[0]
    scheme = scheme_of(format_, **CASES[case])
    w = weight(torch.float32)
    compressor = BaseCompressor.get_value_from_registry(format_)
    stored = compressor.compress({"weight": w, **calibrate(w, scheme.weights)}, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    theirs = save(tmp_path, stored, config).read_quantized(f"{NAME}.weight")
    fixed = theirs.quant_type in ("mxfp4", "nvfp4")
    mine = jaxbnb.quantize(
        w.numpy(), theirs.quant_type, block_size=None if fixed else theirs.block_size
    )
    np.testing.assert_array_equal(mine.absmax, theirs.absmax)
    # The largest value of a block of integers lies half-way between two codes, and XLA
    # rounds the quotient in another way.
    different = np.count_nonzero(np.asarray(mine.codes) != theirs.codes)
    assert different <= (0 if fixed else mine.absmax.size)


def test_awq(tmp_path):
    from compressed_tensors.entrypoints.convert.converters.autoawq import (
        AutoAWQConverter,
    )
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (SIZE, ROWS // 8)).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (SIZE // 64, ROWS // 8)).astype(np.int32)
    scales = rng.random((SIZE // 64, ROWS)).astype(np.float16)
    tensors = {"qweight": words, "qzeros": zeros, "scales": scales}
    tensors = {name: torch.from_numpy(x) for name, x in tensors.items()}
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    checkpoint = save(tmp_path, tensors, config)
    converter = AutoAWQConverter(group_size=64)
    codes, scale, zero = converter._convert_gemm_module(
        tensors["qweight"], tensors["scales"], tensors["qzeros"]
    )
    args = scheme_of(
        "pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False
    ).weights
    want = dequantize(codes, scale, zero, args)
    assert checkpoint.quantized[f"{NAME}.weight"].quant_type == "uint4"
    got = checkpoint.read(f"{NAME}.weight")
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("block", [[16, 128], None])
def test_fp8(block, tmp_path):
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes = weight()[:, :250].to(torch.float8_e4m3fn).contiguous()
    scale = torch.rand((3, 2) if block else (1,))
    tensors = {"weight": codes, "weight_scale_inv": scale}
    config = {"quant_method": "fp8", "weight_block_size": block}
    checkpoint = save(tmp_path, tensors, config)
    want = finegrained._dequantize_fp8_weight(codes, scale, block, torch.float32)
    kernel = checkpoint.read_quantized(f"{NAME}.weight")
    assert kernel.quant_type == "fp8_scaled"
    got = np.asarray(kernel.dequantize(np.float32)).T
    np.testing.assert_array_equal(got, want.numpy())


def test_mxfp4(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 10, 2, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(110, 140, (3, 10, 2), np.uint8))
    tensors = {"experts.w_blocks": blocks, "experts.w_scales": scales}
    checkpoint = save(tmp_path, tensors, {"quant_method": "mxfp4"})
    want = mxfp4.convert_moe_packed_tensors(blocks, scales)
    got = checkpoint.read(f"{NAME}.experts.w")
    assert checkpoint.read_quantized(f"{NAME}.experts.w").shape == (3, 64, 10)
    np.testing.assert_array_equal(got, to_numpy(want))
