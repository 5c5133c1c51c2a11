"""The same in forms that XLA vectorises: compares and selects instead of look-ups."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import _blocks, _dynamic8
from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    decision_points,
)
from jaxbnb_kernels.quantize_blockwise import reference


def quantize(
    x: Float[Array, "*batch n"], codebook: np.ndarray | None, block_size: int
) -> tuple[Integer[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    if codebook is None:
        return reference.quantize(x, codebook, block_size)
    if len(codebook) == 16:
        encode = _encode_by_compares
    elif np.array_equal(codebook, DYNAMIC8_SIGNED):
        encode = _encode_signed
    elif np.array_equal(codebook, DYNAMIC8_UNSIGNED):
        encode = _encode_unsigned
    else:
        raise NotImplementedError("xla encodes no 8-bit codebook but the dynamic maps")
    blocks = _blocks.split(x.astype(jnp.float32), block_size)
    absmax = _blocks.absmax(blocks)
    codes = encode(_blocks.normalize(blocks, absmax), codebook)
    if len(codebook) == 16:
        return _blocks.join(_pack(codes), -(-x.shape[-1] // 2)), absmax
    return _blocks.join(codes, x.shape[-1]), absmax


def dequantize(
    codes: Integer[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"],
    codebook: np.ndarray | None,
    block_size: int,
    size: int,
    dtype: np.dtype,
) -> Float[Array, "*batch {size}"]:
    if codebook is None or len(codebook) == 256:
        # A byte a code: the table look-up of the specification is as fast as any.
        return reference.dequantize(codes, absmax, codebook, block_size, size, dtype)
    blocks = _blocks.split(codes, block_size // 2)
    levels = [level * absmax[..., None] for level in codebook]
    pairs = jnp.stack([_select(levels, blocks >> 4), _select(levels, blocks & 15)], -1)
    pairs = pairs.reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])
    return _blocks.join(pairs, size).astype(dtype)


def _select(
    levels: list[Float32[Array, "*blocks 1"]], codes: UInt8[Array, "*blocks half"]
) -> Float32[Array, "*blocks half"]:
    """levels[code] for 16 of them, as a tree of 15 selects on the bits of the code.

    Under an interleaving a CPU gets through it twice as fast as through a look-up. The
    levels come times their block's absmax: were they constants, XLA would broadcast
    them to the shape of the codes and, in a loop, keep all sixteen alive.
    """
    bits = codes.astype(jnp.int32)
    for bit in range(4):
        is_set = (bits >> bit) & 1 == 1
        pairs = zip(levels[0::2], levels[1::2], strict=True)
        levels = [jnp.where(is_set, one, zero) for zero, one in pairs]
    return levels[0]


def decode_nibbles(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"],
    codebook: np.ndarray,
    block_size: int,
    dtype: np.dtype,
) -> tuple[Float[Array, "*batch blocks half"], Float[Array, "*batch blocks half"]]:
    """The elements of even index and those of odd index, block by block.

    For who needs no interleaving, which costs a CPU more than the decoding.
    """
    # A table for each nibble of a byte, so that nothing is shifted or masked.
    of_high, of_low = np.repeat(codebook, 16), np.tile(codebook, 16)
    blocks = _blocks.split(codes, block_size // 2)
    scale = absmax[..., None]
    high = jnp.asarray(of_high)[blocks] * scale
    low = jnp.asarray(of_low)[blocks] * scale
    return high.astype(dtype), low.astype(dtype)


def _pack(codes: UInt8[Array, "*blocks size"]) -> UInt8[Array, "*blocks half"]:
    """Two codes a byte, the first in the high nibble.

    As a sum over pairs, because XLA fuses that with the encoder; strided slices it
    would compute twice.
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return jnp.sum(pairs * jnp.array([16, 1], jnp.uint8), axis=-1, dtype=jnp.uint8)


def _encode_by_compares(
    x: Float32[Array, "*shape"], codebook: np.ndarray
) -> UInt8[Array, "*shape"]:
    """Counts the decision points below ``x``; works for unsorted code orders too."""
    points, codes = decision_points(codebook)
    # Codes step up by one in NF4; in FP4 the step is what leads to the next pattern.
    steps = np.diff(codes.astype(np.uint8))
    code = jnp.full(x.shape, codes[0], jnp.uint8)
    for point, step in zip(points, steps, strict=True):
        code = code + jnp.where(x > point, step, np.uint8(0))
    return code


def _encode_signed(x: Float32[Array, "*shape"], _) -> UInt8[Array, "*shape"]:
    return _dynamic8.encode(x, signed=True)


def _encode_unsigned(x: Float32[Array, "*shape"], _) -> UInt8[Array, "*shape"]:
    return _dynamic8.encode(x, signed=False)
