"""Scales that are themselves 8-bit floats, as in the formats MXFP4 and NVFP4.

A scale takes the place of an absmax, but is not the largest magnitude of its block: it
is what the levels are multiplied by.

References:
    Rouhani et al., OCP Microscaling Formats (MX) Specification, 2023 (E8M0).
    NVIDIA, Introducing NVFP4, 2025 (E4M3 with a scale for the tensor).
"""

import math
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from jaxbnb_kernels.codebooks import E4M3

ScaleType = Literal["e8m0", "e4m3"]
# The codes of E8M0's NaN and of its smallest number, which is subnormal in float32.
_NAN, _SMALLEST = 255, 0
_BITS_OF_NAN: Final = 0x7FC00000
_BITS_OF_SMALLEST: Final = 0x00400000


def decode_scales(
    codes: UInt8[Array, "*batch rows blocks"],
    tensor_scale: Float32[Array, "*batch 1"] | None,
    scale_type: ScaleType,
) -> Float32[Array, "*batch rows blocks"]:
    r"""Decodes the scales of blocks.

    .. math:: \text{e8m0: } 2^{c - 127}, \qquad \text{e4m3: } c / t

    Args:
        codes: bits of the 8-bit floats.
        tensor_scale: number t that the scales of a matrix are divided by; only for
            e4m3, else None.
        scale_type: "e8m0", only an exponent, or "e4m3", a float8 with a sign.

    Example:
        >>> decode_scales(jnp.array([127, 128], jnp.uint8), None, "e8m0").tolist()
        [1.0, 2.0]
    """
    if tensor_scale is None:
        return _decode_exponents(codes)
    batch = tensor_scale.shape[:-1]
    # XLA would multiply by the reciprocal of what it knows to be a single number, which
    # rounds twice. A table makes that 256 divisions.
    divisors = jnp.broadcast_to(tensor_scale, (*batch, len(E4M3)))
    table = jnp.asarray(E4M3) / jax.lax.optimization_barrier(divisors)
    flat = codes.reshape(*batch, math.prod(codes.shape[len(batch) :]))
    scales = jnp.take_along_axis(table, flat.astype(jnp.int32), axis=-1)
    return scales.reshape(codes.shape)


def _decode_exponents(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    # An exponent is the exponent of a float32.
    bits = codes.astype(jnp.uint32) << 23
    bits = jnp.where(codes == _SMALLEST, jnp.uint32(_BITS_OF_SMALLEST), bits)
    bits = jnp.where(codes == _NAN, jnp.uint32(_BITS_OF_NAN), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
