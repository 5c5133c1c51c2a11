"""Double quantisation: the absmax of a matrix are themselves quantised to 8 bits.

absmax = level[code] * nested_absmax + offset. The offset is the mean of the absmax, and
256 absmax share one nested_absmax. 32 bits per block become 8.127.

References:
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.quantize_blockwise import reference
from jaxbnb_kernels.quantize_blockwise.api import quantize_blockwise
from jaxbnb_kernels.quantize_blockwise.reference import NESTED_BLOCK_SIZE


def quantize_absmax(
    absmax: Float32[Array, "*shape"],
) -> tuple[
    UInt8[Array, "*shape"], Float32[Array, "*batch nested"], Float32[Array, "*batch"]
]:
    """Quantises each matrix of absmax (the last two axes) separately.

    Args:
        absmax: float32 ``(*batch, rows, blocks)``, or ``(blocks,)``.

    Returns:
        ``(codes, nested_absmax, offset)``: codes in the shape of ``absmax``, float32
        ``(*batch, ceil(rows * blocks / 256))`` and float32 ``batch``.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, nested, offset = quantize_absmax(jnp.array([[1., 2.], [3., 4.]]))
        >>> codes.shape, nested.tolist(), offset.tolist()
        ((2, 2), [1.5], 2.5)
    """
    batch = absmax.shape[:-2]
    flat = absmax.reshape(*batch, math.prod(absmax.shape[len(batch) :]))
    # Near float32's maximum the sum would overflow; a power of two is exact.
    largest = jnp.max(flat, axis=-1, initial=0.0)
    scale = jnp.where(largest > 2.0**64, 2.0**-64, 1.0).astype(jnp.float32)
    # An empty matrix has no mean; its offset is never used.
    mean = jnp.sum(flat * scale[..., None], axis=-1) / max(flat.shape[-1], 1)
    offset = mean / scale
    codes, nested_absmax = quantize_blockwise(
        flat - offset[..., None], DYNAMIC8_SIGNED, block_size=NESTED_BLOCK_SIZE
    )
    return codes.reshape(absmax.shape), nested_absmax, offset


def dequantize_absmax(
    codes: UInt8[Array, "*shape"],
    nested_absmax: Float32[Array, "*batch nested"],
    offset: Float32[Array, "*batch"],
) -> Float32[Array, "*shape"]:
    """Decodes the result of `quantize_absmax`.

    Example:
        >>> import jax.numpy as jnp
        >>> nested = quantize_absmax(jnp.array([[1., 2.], [3., 4.]]))
        >>> dequantize_absmax(*nested).round(1).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    return reference.float_absmax(codes, (nested_absmax, offset))
