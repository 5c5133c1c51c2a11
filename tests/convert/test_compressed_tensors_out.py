"""What is written for compressed-tensors is read back as the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbnb import QuantConfig, convert, quantize
from jaxbnb.convert.writers import COMPRESSED_TENSORS_TYPES

NAME = "model.layers.0.mlp.up_proj.weight"
ROWS, SIZE = 20, 96


@pytest.fixture
def source(folder):
    rng = np.random.default_rng(0)
    tensors = {
        NAME: rng.standard_normal((ROWS, SIZE), np.float32),
        "lm_head.weight": rng.standard_normal((8, SIZE), np.float32),
        "model.norm.weight": np.ones(SIZE, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@pytest.mark.parametrize("quant_type", COMPRESSED_TENSORS_TYPES)
def test_read_back(source, tmp_path, quant_type):
    folder, tensors = source
    has_blocks = quant_type not in ("llm_int8", "fp8_e4m3", "mxfp4", "nvfp4")
    quant = QuantConfig(
        quant_type,
        block_size=32 if has_blocks else None,
        act_quant_type="fp8_e4m3" if quant_type == "fp8_e4m3" else None,
    )
    out = convert.convert_checkpoint(
        folder, tmp_path / "out", quant=quant, to="compressed-tensors"
    )
    fields = out.config["quantization_config"]
    assert fields["ignore"] == ["lm_head"]
    assert fields["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert list(out.quantized) == [NAME]
    if quant_type == "llm_int8":
        # Its inputs are rounded, too.
        assert out.quantized[NAME] == QuantConfig("llm_int8", outlier_threshold=0)
    want = quant.quantize_kernel(jnp.asarray(tensors[NAME].T)).dequantize()
    got = jax.tree.map(jnp.asarray, out.read_quantized(NAME)).dequantize(jnp.float32)
    # Levels k / n times an absmax, or k times absmax / n: three roundings apart. In the
    # formats with scales, all numbers are the same.
    rtol = 3 * 2**-24 * 2 if quant_type in ("int4", "int8", "llm_int8") else 0
    rtol = 2**-22 if quant_type == "fp8_e4m3" else rtol
    np.testing.assert_allclose(got, want, rtol=rtol)
    np.testing.assert_array_equal(out.read("lm_head.weight"), tensors["lm_head.weight"])


def test_calibrated_kernels_are_written_as_they_are(source, tmp_path):
    folder, tensors = source
    q = quantize(jnp.asarray(tensors[NAME].T) / 2, "int4", block_size=32, axis=-2)
    out = convert.convert_checkpoint(
        folder,
        tmp_path / "out",
        quant=QuantConfig("int4", 32),
        to="compressed-tensors",
        quantized={NAME: q},
    )
    got = out.read_quantized(NAME)
    np.testing.assert_array_equal(got.codes, q.codes)
    np.testing.assert_array_equal(got.absmax, np.asarray(q.absmax) / np.float32(7))
