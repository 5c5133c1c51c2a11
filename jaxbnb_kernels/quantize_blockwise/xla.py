"""Forms that XLA vectorises: compares and selects instead of look-ups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8, UInt16

from jaxbnb_kernels import _dynamic8, blockwise
from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    decision_points,
)
from jaxbnb_kernels.quantize_blockwise import reference


def quantize(
    x: Float[Array, "*batch n"], codebook: np.ndarray | None, block_size: int
) -> tuple[Integer[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """See `quantize_blockwise`."""
    if codebook is None:
        return reference.quantize(x, codebook, block_size)
    if len(codebook) == 16:
        encode = _encode_by_compares
    elif np.array_equal(codebook, DYNAMIC8_SIGNED):
        encode = _encode_signed
    elif np.array_equal(codebook, DYNAMIC8_UNSIGNED):
        encode = _encode_unsigned
    else:
        raise NotImplementedError(
            "xla encodes no 8-bit codebook except the dynamic maps"
        )
    blocks = blockwise.split(x.astype(jnp.float32), block_size)
    absmax = blockwise.absmax(blocks)
    codes = encode(blockwise.normalize(blocks, absmax), codebook)
    if len(codebook) == 16:
        return blockwise.join(_pack(codes), -(-x.shape[-1] // 2)), absmax
    return blockwise.join(codes, x.shape[-1]), absmax


def dequantize(
    codes: Integer[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    nested: tuple[Array, Array] | None,
    codebook: np.ndarray | None,
    block_size: int,
    size: int,
    dtype: np.dtype,
    zero_point: UInt8[Array, "*batch blocks"] | None = None,
) -> Float[Array, "*batch {size}"]:
    """See `dequantize_blockwise`."""
    absmax = reference.float_absmax(absmax, nested)
    if codebook is None or len(codebook) == 256:
        # With one code per byte, the specification's table look-up is as fast as any.
        return reference.dequantize(
            codes, absmax, None, codebook, block_size, size, dtype, zero_point
        )
    halves = decode_nibbles(
        codes, absmax, codebook, block_size, np.dtype(np.float32), zero_point
    )
    pairs = _interleave(*halves, dtype)
    return blockwise.join(pairs.reshape(*pairs.shape[:-2], 2 * pairs.shape[-2]), size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _interleave(
    even: Float32[Array, "*half"], odd: Float32[Array, "*half"], dtype: np.dtype
) -> Float[Array, "*half 2"]:
    """Pairs the two in ``dtype``, rounding to bfloat16 by integer arithmetic.

    On a CPU, XLA's own conversion spends half of its instructions on NaN, and its
    concatenation of bfloat16 goes through float32.
    """
    if dtype != jnp.bfloat16:
        return jnp.stack([even.astype(dtype), odd.astype(dtype)], axis=-1)
    pairs = jnp.stack([_round_to_bfloat16(even), _round_to_bfloat16(odd)], axis=-1)
    return jax.lax.bitcast_convert_type(pairs, jnp.bfloat16)


@_interleave.defjvp
def _interleave_jvp(dtype, primals, tangents):
    return _interleave(*primals, dtype), jnp.stack(tangents, axis=-1).astype(dtype)


def _round_to_bfloat16(x: Float32[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """Returns the bits of x.astype(bfloat16), if every NaN is the canonical one.

    The canonical NaN survives the rounding. Others could carry into the sign.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # To nearest, ties to even: a carry into the upper half.
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(jnp.uint16)


def decode_nibbles(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"],
    codebook: np.ndarray,
    block_size: int,
    dtype: np.dtype,
    zero_point: UInt8[Array, "*batch blocks"] | None = None,
) -> tuple[Float[Array, "*batch blocks half"], Float[Array, "*batch blocks half"]]:
    """Decodes elements with even and with odd index separately, block by block.

    Callers that do not interleave them save what costs a CPU more than the decoding.
    """
    # A table for each nibble of a byte, so that nothing is shifted or masked.
    high_levels, low_levels = np.repeat(codebook, 16), np.tile(codebook, 16)
    blocks = blockwise.split(codes, block_size // 2)
    # The canonical NaN, which `_round_to_bfloat16` keeps.
    scale = jnp.where(jnp.isnan(absmax), jnp.nan, absmax)[..., None]
    high, low = (jnp.asarray(x)[blocks] for x in (high_levels, low_levels))
    if zero_point is not None:
        zero = zero_point[..., None].astype(jnp.float32)
        high, low = high - zero, low - zero
    return (high * scale).astype(dtype), (low * scale).astype(dtype)


def _pack(codes: UInt8[Array, "*blocks size"]) -> UInt8[Array, "*blocks half"]:
    """Packs two codes per byte, the first in the high nibble.

    XLA fuses a sum over pairs with the encoder. With strided slices it would run the
    encoder twice.
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return jnp.sum(pairs * jnp.array([16, 1], jnp.uint8), axis=-1, dtype=jnp.uint8)


def _encode_by_compares(
    x: Float32[Array, "*shape"], codebook: np.ndarray
) -> UInt8[Array, "*shape"]:
    """Counts the decision points below ``x``; works for unsorted code orders too."""
    points, codes = decision_points(codebook)
    # In NF4 each step is one. In FP4 it leads from a bit pattern to the next level's.
    steps = np.diff(codes.astype(np.uint8))
    code = jnp.full(x.shape, codes[0], jnp.uint8)
    for point, step in zip(points, steps, strict=True):
        code = code + jnp.where(x > point, step, np.uint8(0))
    return code


def _encode_signed(x: Float32[Array, "*shape"], _) -> UInt8[Array, "*shape"]:
    return _dynamic8.encode(x, signed=True)


def _encode_unsigned(x: Float32[Array, "*shape"], _) -> UInt8[Array, "*shape"]:
    return _dynamic8.encode(x, signed=False)
