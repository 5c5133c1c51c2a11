"""Blocks of float32 state to codes and back: in 8 bits, in 4 bits and in fp8.

The dynamic maps of 8 and 4 bits come in pairs, signed and unsigned. Where the sign of
an array is not known beforehand, each block without a negative element takes the
unsigned map, which has twice the levels there. The sign bit of its absmax says so. In
every format, a value that is not zero stays so: an optimizer may divide by its root.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from jaxbnb_kernels import blockwise
from jaxbnb_kernels.codebooks import (
    DYNAMIC4_SIGNED,
    DYNAMIC4_UNSIGNED,
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
)
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

Bits = Literal[4, 8, "fp8"]
Blocks = Float32[Array, "*blocks size"]
Encoded = tuple[Shaped[Array, "*blocks stored"], Float32[Array, "*blocks"]]

# By whether the map is signed.
_CODEBOOKS = {
    8: {True: DYNAMIC8_SIGNED, False: DYNAMIC8_UNSIGNED},
    4: {True: DYNAMIC4_SIGNED, False: DYNAMIC4_UNSIGNED},
}
_FP8_MAX, _FP8_TINY = 448.0, 2.0**-9


def encode(blocks: Blocks, bits: Bits, signed: bool | None = None) -> Encoded:
    """Codes and absmax of blocks, to the nearest level.

    Args:
        blocks: values, one block a row.
        bits: format of the codes.
        signed: which dynamic map; None to choose it block by block.
    """
    if bits == "fp8":
        return _encode_fp8(blocks, blockwise.absmax_of_finite(blocks))

    def by_map(is_signed):
        codes, absmax = quantize_blockwise(
            blocks,
            _CODEBOOKS[bits][is_signed],
            block_size=blocks.shape[-1] + blocks.shape[-1] % 2,
        )
        codes = codes if is_signed else _keep_positive(codes, blocks, bits)
        return codes, absmax[..., 0]

    if signed is not None:
        return by_map(signed)
    codes, absmax = by_map(True)
    nonnegative = jnp.min(blocks, axis=-1) >= 0
    codes = jnp.where(nonnegative[..., None], by_map(False)[0], codes)
    return codes, jnp.where(nonnegative, -absmax, absmax)


def decode(
    codes: Shaped[Array, "*blocks stored"],
    absmax: Float32[Array, "*blocks"],
    bits: Bits,
    size: int,
    signed: bool | None = None,
) -> Blocks:
    """The inverse of `encode`, for blocks of ``size`` elements."""
    if bits == "fp8":
        return codes.astype(jnp.float32) * (absmax / _FP8_MAX)[..., None]

    def by_map(is_signed):
        return dequantize_blockwise(
            codes,
            jnp.abs(absmax)[..., None],
            _CODEBOOKS[bits][is_signed],
            block_size=size + size % 2,
            size=size,
        )

    if signed is not None:
        return by_map(signed)
    return jnp.where(jnp.signbit(absmax)[..., None], by_map(False), by_map(True))


def encode_exactly(blocks: Blocks, bits: Bits, signed: bool | None = None) -> Encoded:
    """As `encode`, but values that `decode` returned get their old codes and absmax.

    The largest magnitude of a decoded block need not be the absmax that it was decoded
    with. The signed dynamic maps have no -1, so a block with a negative largest element
    comes back 0.7% smaller (11% in 4 bits), and shrinks again in every round trip. So
    other absmax are tried, and the first one wins with which each element of the block
    decodes to itself. Where there is none, the block is encoded as a step does it.
    """
    size = blocks.shape[-1]

    def encode_with(absmax, filler=0.0):
        """Codes with this absmax, unless an element is larger."""
        if bits == "fp8":
            return _encode_fp8(blocks, absmax)
        # One more element in each block that has this absmax, and another to keep
        # their number even.
        more = jnp.stack([absmax, absmax * filler], axis=-1)
        wide = jnp.concatenate([blocks, more], axis=-1)
        codes, absmax = encode(wide, bits, signed)
        return codes[..., : size * bits // 8], absmax

    def is_exact(codes, absmax):
        return jnp.all(decode(codes, absmax, bits, size, signed) == blocks, axis=-1)

    # Each with the largest level of its map, as a part of the absmax.
    others: list[tuple[Callable[[Any], Encoded], float]] = []
    if bits == "fp8":
        others = [(encode_with, 1.0)]
    elif signed is not False:
        # Where the largest element was negative.
        others = [(encode_with, -float(_CODEBOOKS[bits][True][0]))]
        if signed is None:
            # In the signed map, though small negative elements have become zero.
            others.insert(0, (lambda absmax: encode_with(absmax, filler=-1.0), 1.0))
    largest = blockwise.absmax(blocks)
    codes, absmax = encode_with(largest)
    exact = is_exact(codes, absmax)
    for other, level in others:

        def attempt(best, tried, other=other):
            codes, absmax, exact = best
            new_codes, new_absmax = other(tried)
            new_exact = is_exact(new_codes, new_absmax)
            better = new_exact & ~exact
            codes = jnp.where(better[..., None], new_codes, codes)
            absmax = jnp.where(better, new_absmax, absmax)
            return (codes, absmax, exact | new_exact), None

        near = _near(largest / jnp.float32(level))
        (codes, absmax, exact), _ = jax.lax.scan(attempt, (codes, absmax, exact), near)
    return codes, absmax


def _near(x: Float32[Array, "*blocks"]) -> Float32[Array, "7 *blocks"]:
    """The seven floats around a quotient, the nearest first.

    The dividend was a rounded product of the absmax, which is therefore at most two
    steps away: three in fp8, where a level is rounded twice, and on a device that
    divides coarsely.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    steps = jnp.asarray([0, -1, 1, -2, 2, -3, 3], jnp.int32)
    # Neighbours in bits are neighbours in size; there are none below zero.
    near = jnp.maximum(bits + steps.reshape(-1, *(1 for _ in x.shape)), 0)
    return jax.lax.bitcast_convert_type(near, jnp.float32)


def _keep_positive(codes: jax.Array, blocks: jax.Array, bits: Bits) -> jax.Array:
    """Replaces zero, which is code 0, by the smallest level where a value is above."""
    if bits == 8:
        return jnp.maximum(codes, (blocks > 0).astype(jnp.uint8))
    high, low = (
        jnp.maximum(c, (x > 0).astype(jnp.uint8))
        for c, x in ((codes >> 4, blocks[..., 0::2]), (codes & 15, blocks[..., 1::2]))
    )
    return high << 4 | low


def _encode_fp8(blocks: jax.Array, absmax: jax.Array) -> Encoded:
    scale = jnp.where(absmax > 0, _FP8_MAX / absmax, 0.0)
    codes = (blocks * scale[..., None]).astype(jnp.float8_e4m3fn)
    lost = (blocks != 0) & (codes.astype(jnp.float32) == 0)
    tiny = jnp.copysign(_FP8_TINY, blocks).astype(jnp.float8_e4m3fn)
    return jnp.where(lost, tiny, codes), absmax
