"""Encodes blocks that store a scale, as other libraries choose it, and not an absmax.

Scales and codes are those of compressed-tensors. Computed in float32.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jaxbnb.core import formats
from jaxbnb_kernels import blockwise
from jaxbnb_kernels.quantize_blockwise import decode_scales

_E4M3_MAX: Final = np.float32(448)
_E2M1_MAX: Final = np.float32(6)
# The exponent of a block's largest value becomes that of E2M1's largest, 4 to 6.
_E2M1_EXPONENT: Final = 2
# Values from 7/4 of a power of two are nearer to the next one, rounded to E2M1.
_QUARTER: Final = 1 << 21
# Points between the levels of E2M1; at a tie the code with an even last bit wins.
_E2M1_POINTS: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize_scaled(
    x: Float[Array, "*batch rows n"], quant_type: str, block_size: int
) -> dict[str, Any]:
    """Returns the parts of a `QuantizedArray` for ``x``, blocked along its last axis.

    Args:
        x: floating array.
        quant_type: a format of `formats.SCALED`.
        block_size: elements that share a scale.

    Example:
        >>> parts = quantize_scaled(jnp.array([1.0, -6.0]), "mxfp4", 2)
        >>> hex(parts["codes"].item()), parts["absmax"].item()
        ('0x2f', 127)
    """
    scaled = formats.SCALED[quant_type]
    blocks = blockwise.split(x.astype(jnp.float32), block_size)
    largest = blockwise.absmax(blocks)
    stored, tensor_scale, zero_point = largest, None, None
    if scaled.scale_type == "e8m0":
        stored = _choose_exponents(largest)
    elif scaled.scale_type == "e4m3":
        stored, tensor_scale = _choose_e4m3(largest)
    elif scaled.has_zero_point:
        stored, zero_point = _choose_range(blocks, 2**scaled.bits - 1)
    else:
        stored = _divide(largest, scaled.largest)
    scales = (
        stored
        if scaled.scale_type is None
        else decode_scales(stored, tensor_scale, scaled.scale_type)
    )
    # A block of zeros has scale 0, and the code of zero.
    units = jnp.where(scales[..., None] == 0, 0.0, blocks / scales[..., None])
    if quant_type == "fp8_scaled":
        codes = _encode_e4m3(units)
    elif scaled.scale_type is not None:
        codes = _encode_e2m1(units)
    elif zero_point is not None:
        codes = _encode_integers(
            units + zero_point[..., None].astype(jnp.float32), 0, 2**scaled.bits - 1
        )
    else:
        half = 2 ** (scaled.bits - 1)
        codes = _encode_integers(units, -half, half - 1) + half
    codes = blockwise.join(codes.astype(jnp.uint8), x.shape[-1])
    if scaled.bits == 4:
        codes = _pack(codes)
    return {
        "codes": codes,
        "absmax": stored,
        "nested_absmax": tensor_scale,
        "zero_point": zero_point,
    }


def _divide(x: Float32[Array, "*shape"], divisor: float) -> Float32[Array, "*shape"]:
    """Divides by a constant, where XLA may multiply by its rounded reciprocal."""
    divisors = jnp.full_like(x, divisor)
    return x / jax.lax.optimization_barrier(divisors)


def _choose_exponents(
    largest: Float32[Array, "*blocks"],
) -> UInt8[Array, "*blocks"]:
    """Rounds to a power of two, so that the largest value rounds to one of E2M1."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) + _QUARTER
    exponent = (bits >> 23).astype(jnp.int32) - _E2M1_EXPONENT
    code = jnp.clip(exponent, 0, 254).astype(jnp.uint8)
    return jnp.where(jnp.isfinite(largest), code, jnp.uint8(255))


def _choose_e4m3(
    largest: Float32[Array, "*batch blocks"],
) -> tuple[UInt8[Array, "*batch blocks"], Float32[Array, "*outer 1"]]:
    """Returns the bits of scales, and the number that all of a matrix are divided by.

    The largest scale of a matrix becomes the largest number of E4M3.
    """
    matrix = tuple(range(max(largest.ndim - 2, 0), largest.ndim))
    whole = jnp.max(largest, axis=matrix, keepdims=True, initial=0.0)
    # The quotient overflows if the whole matrix is tiny.
    factor = jnp.minimum(_E4M3_MAX * _E2M1_MAX / whole, jnp.finfo(jnp.float32).max)
    factor = jnp.where(whole == 0, 1.0, factor)
    # A scale above zero is never stored as zero, or its block would be lost.
    scales = jnp.clip(factor * _divide(largest, _E2M1_MAX), max=_E4M3_MAX)
    scales = scales.astype(jnp.float8_e4m3fn)
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint8)
    bits = jnp.where((bits == 0) & (largest > 0), jnp.uint8(1), bits)
    return bits, factor.reshape(*largest.shape[:-2], 1)


def _choose_range(
    blocks: Float32[Array, "*blocks size"], top: int
) -> tuple[Float32[Array, "*blocks"], UInt8[Array, "*blocks"]]:
    """Spreads the codes between a block's smallest and largest value, and zero."""
    low = jnp.min(blocks, axis=-1, initial=0.0)
    high = jnp.max(blocks, axis=-1, initial=0.0)
    # On a CPU, XLA's minimum of a large array may skip a NaN.
    has_nan = jnp.any(blocks != blocks, axis=-1)
    scale = jnp.where(has_nan, jnp.nan, _divide(high - low, top))
    zero = jnp.round(jnp.where(scale > 0, -low / scale, 0.0))
    return scale, jnp.clip(zero, 0, top).astype(jnp.uint8)


def _encode_e2m1(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for lower, point in enumerate(_E2M1_POINTS):
        above = magnitude >= point if lower % 2 else magnitude > point
        code = code + above.astype(jnp.uint8)
    return code | jnp.where(x < 0, jnp.uint8(8), jnp.uint8(0))


def _encode_e4m3(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    # Rounding may bring a quotient above the largest number, which would become NaN.
    clipped = jnp.clip(x, -_E4M3_MAX, _E4M3_MAX).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(clipped, jnp.uint8)


def _encode_integers(
    x: Float32[Array, "*shape"], low: int, high: int
) -> Int32[Array, "*shape"]:
    return jnp.clip(jnp.round(x), low, high).astype(jnp.int32)


def _pack(codes: UInt8[Array, "*batch n"]) -> UInt8[Array, "*batch half"]:
    """Packs two codes per byte, the first one in the high nibble."""
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., 0::2] << 4 | codes[..., 1::2]
