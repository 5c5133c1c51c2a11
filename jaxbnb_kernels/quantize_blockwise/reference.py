"""The specification: mid-points of the codebook, a sorted search, a table look-up."""

import math
from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import blockwise
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, decision_points

# Number of absmax that share one nested absmax.
NESTED_BLOCK_SIZE: Final = 256
# The distance of linear int8's levels for an absmax of one. XLA turns a division by 127
# into this product in some programs and not in others.
LINEAR_STEP: Final = np.float32(1 / 127)


def quantize(
    x: Float[Array, "*batch n"], codebook: np.ndarray | None, block_size: int
) -> tuple[Integer[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """See `quantize_blockwise`."""
    blocks = blockwise.split(x.astype(jnp.float32), block_size)
    absmax = blockwise.absmax(blocks)
    scaled = blockwise.normalize(blocks, absmax)
    if codebook is None:
        codes = jnp.round(127.0 * scaled).astype(jnp.int8)
        return blockwise.join(codes, x.shape[-1]), absmax
    points, code_of = decision_points(codebook)
    index = jnp.searchsorted(jnp.asarray(points), scaled, side="left")
    codes = jnp.asarray(code_of, jnp.uint8)[index]
    if len(codebook) == 16:
        high, low = codes[..., 0::2], codes[..., 1::2]
        return blockwise.join(high << 4 | low, -(-x.shape[-1] // 2)), absmax
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
    absmax = float_absmax(absmax, nested)
    if codebook is None:
        levels = codes.astype(jnp.float32)
        absmax = absmax * LINEAR_STEP
    else:
        if len(codebook) == 16:
            codes = jnp.stack([codes >> 4, codes & 15], axis=-1)
            codes = codes.reshape(*codes.shape[:-2], 2 * codes.shape[-2])[..., :size]
        levels = jnp.asarray(codebook)[codes.astype(jnp.int32)]
    blocks = blockwise.split(levels, block_size)
    if zero_point is not None:
        blocks = blocks - zero_point[..., None].astype(jnp.float32)
    return blockwise.join(blocks * absmax[..., None], size).astype(dtype)


def float_absmax(
    absmax: Float32[Array, "*shape"] | UInt8[Array, "*shape"],
    nested: tuple[Array, Array] | None,
) -> Float32[Array, "*shape"]:
    """Returns the absmax, decoded by `dequantize_absmax` if it is nested."""
    if nested is None:
        return absmax
    nested_absmax, offset = nested
    batch = offset.shape
    flat = absmax.reshape(*batch, math.prod(absmax.shape[len(batch) :]))
    decoded = dequantize(
        flat,
        nested_absmax,
        None,
        DYNAMIC8_SIGNED,
        NESTED_BLOCK_SIZE,
        flat.shape[-1],
        np.dtype(np.float32),
    )
    return (decoded + offset[..., None]).reshape(absmax.shape)
