"""Formats that store scales, which other libraries' checkpoints have."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxbnb
from jaxbnb.core import formats
from jaxbnb_kernels import codebooks
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.quantize_blockwise import decode_scales

BITS = {
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 / 2**18,
    "int4_scaled": 4 + 32 / 64,
    "int8_scaled": 8 + 32 / 64,
    "uint4": 4 + 40 / 64,
    "uint8": 8 + 40 / 64,
    "fp8_scaled": 8 + 32 / 128,
}
every_format = pytest.mark.parametrize("name", formats.SCALED)


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x)


def float_scales(q):
    """Decodes scales by the dtypes of another library."""
    absmax = np.asarray(q.absmax)
    if q.quant_type == "mxfp4":
        return absmax.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    if q.quant_type == "nvfp4":
        scales = absmax.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return scales / np.asarray(q.nested_absmax)[..., None]
    return absmax


def all_levels(name):
    """Returns what codes stand for, by the dtypes of another library."""
    if name in ("mxfp4", "nvfp4"):
        codes = np.arange(16, dtype=np.uint8)
        return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    if name == "fp8_scaled":
        codes = np.arange(256, dtype=np.uint8)
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    bits = formats.SCALED[name].bits
    first = 0 if name.startswith("u") else -(2 ** (bits - 1))
    return np.arange(first, first + 2**bits, dtype=np.float32)


@every_format
def test_elements_are_levels_times_scales(name):
    """And no other level would be nearer."""
    x = normal((3, 5, 202))
    q = jaxbnb.quantize(x, name)
    size = formats.SCALED[name].block_size
    codes = np.asarray(q.codes)
    if formats.is_packed(name):
        codes = np.stack([codes >> 4, codes & 15], -1).reshape(3, 5, 202)
    levels = all_levels(name)
    np.testing.assert_array_equal(formats.codebook(name), levels)
    scale = float_scales(q).repeat(size, -1)[..., :202]
    zero = 0 if q.zero_point is None else np.asarray(q.zero_point).astype(np.float32)
    zero = np.repeat(zero, size, -1)[..., :202] if np.ndim(zero) else zero
    decoded = (levels[codes] - zero) * scale
    np.testing.assert_array_equal(q.dequantize(), decoded)
    bf16 = decoded.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(q.dequantize(jnp.bfloat16), bf16)
    candidates = (
        np.unique(levels[np.isfinite(levels)])[:, None, None, None] - zero
    ) * (scale)
    best = np.min(np.abs(candidates - np.asarray(x)), axis=0)
    # The quotient by the scale is rounded before the level is chosen.
    allowed = best + 2.0**-22 * np.abs(np.asarray(x))
    assert np.all(np.abs(decoded - np.asarray(x)) <= allowed)


@every_format
def test_layout(name):
    q = jaxbnb.quantize(normal((512, 512)), name, axis=-2)
    assert q.bits_per_param == BITS[name]
    assert not q.double_quant
    assert (q.zero_point is not None) == name.startswith("u")
    many = jaxbnb.quantize(normal((2, 3, 64, 128)), name)
    again = jaxbnb.quantize(many.dequantize()[1, 2], name)
    assert many[1, 2].shape == again.shape == (64, 128)
    np.testing.assert_array_equal(many[1, 2].dequantize(), many.dequantize()[1, 2])
    assert jaxbnb.quantize(normal((101,)), name).dequantize().shape == (101,)
    assert jaxbnb.quantize(normal((0, 4)), name).dequantize().shape == (0, 4)
    assert jaxbnb.quantize(normal((4, 0)), name).dequantize().shape == (4, 0)


@every_format
def test_zeros_and_what_is_not_finite(name):
    x = jnp.abs(normal((4, 256))).at[:, ::3].set(0.0).at[2].set(0.0)
    q = jaxbnb.quantize(x, name)
    np.testing.assert_array_equal(q.dequantize()[:, ::3], 0.0)
    np.testing.assert_array_equal(q.dequantize()[2], 0.0)
    np.testing.assert_array_equal(jaxbnb.quantize(0 * x, name).dequantize(), 0.0)
    size = formats.SCALED[name].block_size
    for value in (jnp.nan, jnp.inf):
        bad = jaxbnb.quantize(x.at[1, 128].set(value), name).dequantize()
        assert not np.any(np.isfinite(bad[1, 128 : 128 + size]))
        # One number scales a whole matrix of nvfp4.
        if name != "nvfp4":
            np.testing.assert_array_equal(bad[0], q.dequantize()[0])


def test_scales_at_the_ends_of_their_range():
    codes = jnp.array([0, 1, 254, 255], jnp.uint8)
    got = np.asarray(decode_scales(codes, None, "e8m0"))
    assert got[1:3].tolist() == [2.0**-126, 2.0**127]
    assert got.view(np.uint32)[0] == 0x00400000
    assert np.isnan(got[3])
    # The largest value of a block, just below and from 7/4 of a power of two.
    x = jnp.array([[1.74] + [0.0] * 31, [1.75] + [0.0] * 31], jnp.float32)
    q = jaxbnb.quantize(x, "mxfp4")
    assert q.absmax.tolist() == [[125], [126]]
    assert q.dequantize()[:, 0].tolist() == [1.5, 2.0]


def test_a_scale_above_zero_is_not_stored_as_zero():
    x = jnp.ones((2, 16)).at[1].set(2.0**-20)
    q = jaxbnb.quantize(x, "nvfp4")
    assert q.absmax.tolist() == [[0x7E], [1]]


@pytest.mark.parametrize("name", ["mxfp4", "int8_scaled", "fp8_scaled"])
def test_the_native_kernel_multiplies_by_these_levels(name):
    """Without zero points, the kernels take scales for absmax."""
    x, w = normal((3, 256)).astype(jnp.bfloat16), normal((256, 48), 1)
    q = jaxbnb.quantize(w, name, axis=-2)
    want = jaxbnb.matmul(x, q, implementation="xla")
    got = jaxbnb.matmul(x, q)
    terms = jnp.abs(x.astype(jnp.float32)) @ jnp.abs(q.dequantize())
    # 256 sums in float32 in another order, and one rounding of the result.
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    assert np.all(np.abs(got - want) <= 2**-8 * np.abs(want) + 2**-15 * terms)


def test_kernels_refuse_zero_points():
    q = jaxbnb.quantize(normal((64, 8)), "uint4", axis=-2)
    for implementation in ("cpu", "mosaic_gpu"):
        with pytest.raises(NotImplementedError, match="cannot subtract zero points"):
            jaxbnb.matmul(normal((2, 64)), q, implementation=implementation)
    zero = jnp.zeros((8, 2), jnp.uint8)
    weight = Weight(q.codes, q.absmax, None, codebooks.UNSIGNED4, 64, 64, zero)
    with pytest.raises(ValueError, match=r"as many zero points; got \(8, 2\)"):
        matmul_blockwise(
            normal((2, 64)), weight, transpose=True, implementation="reference"
        )


def test_cast_parts_are_refused():
    q = jaxbnb.quantize(normal((4, 64)), "mxfp4")
    cast = jax.tree.map(lambda x: x.astype(jnp.float32), q)
    with pytest.raises(TypeError, match="mxfp4 has codes in float32, not uint8"):
        cast.dequantize()
