"""How a state array is held in 8 bits, 4 bits or fp8, whatever its sign.

Where no element of a block is negative it takes the unsigned map, which has twice the
levels there; the sign bit of its absmax says so. In every format a value that is not
zero stays so: an optimizer may divide by its root.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32, Shaped

from jaxbnb.core.formats import check_block_size
from jaxbnb.optim._exact import encode_exactly
from jaxbnb.optim._sharding import explicit_spec, on_shards, uncut_spec
from jaxbnb_kernels import _blocks
from jaxbnb_kernels.codebooks import (
    DYNAMIC4_SIGNED,
    DYNAMIC4_UNSIGNED,
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
)
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from jaxbnb_kernels.update_8bit import block_layout

StateBits = Literal[4, 8, 32, "fp8"]
_CODEBOOKS = {
    8: (DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED),
    4: (DYNAMIC4_SIGNED, DYNAMIC4_UNSIGNED),
}
_FP8_MAX, _FP8_TINY = 448.0, 2.0**-9


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """The format of one array of state.

    Attributes:
        state_bits: 8 or 4 for the dynamic maps, "fp8" for e4m3, 32 for as it is.
        block_size: elements that share an absmax.
    """

    state_bits: StateBits
    block_size: int

    def __post_init__(self):
        if self.state_bits not in (4, 8, 32, "fp8"):
            raise ValueError(
                f"state_bits must be 8, 4, 'fp8' or 32; got {self.state_bits!r}"
            )
        check_block_size(self.block_size)

    @property
    def codes_dtype(self) -> Any:
        """Of the codes; float32 where there are none."""
        return {"fp8": jnp.float8_e4m3fn, 32: jnp.float32}.get(
            self.state_bits, jnp.uint8
        )

    # Compiled, so that arrays of one shape are traced once and not a hundred times.
    @functools.partial(jax.jit, static_argnums=0)
    def encode(
        self, x: Float32[Array, "*shape"]
    ) -> tuple[Shaped[Array, "*codes"], Float32[Array, "*blocks"]]:
        """The codes of an array and its absmax, each of the array's rank.

        Codes are uint8 or float8_e4m3fn, in the array's own shape; in 4 bits, two a
        byte, the last axis is half as long. Where an odd last axis is shorter than a
        block they are of 8 bits instead.
        """

        def encode(x):
            bits = self._bits(x.shape)
            return self._by_blocks(x, lambda blocks: _encode(blocks, bits))

        return self._by_shards(encode, x)

    def encode_exactly(
        self, x: Float32[Array, "*shape"]
    ) -> tuple[Shaped[Array, "*codes"], Float32[Array, "*blocks"]]:
        """As `encode`, but of values out of `decode` what they were decoded from."""
        return self._by_shards(self._encode_exactly, x)

    def _encode_exactly(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = block_layout(x.shape, self.block_size).size
        bits = self._bits(x.shape)

        def decode(codes, absmax):
            return _decode(codes, absmax, bits, size)

        if bits == "fp8":
            others = [(_encode_fp8, 1.0)]
            return self._by_blocks(
                x, lambda b: encode_exactly(b, decode, _encode_fp8, others)
            )

        def encode(blocks, absmax, filler=0.0):
            # An element more in each block has the absmax that it shall have, and one
            # more keeps their number even.
            more = jnp.stack([absmax, absmax * filler], axis=-1)
            wide = jnp.concatenate([blocks, more], axis=-1)
            codes, absmax = _encode_dynamic(wide, bits)
            return codes[..., : size * bits // 8], absmax

        # In the signed map, though small negative elements have become zero; and where
        # the largest element was negative.
        others = [
            (lambda blocks, absmax: encode(blocks, absmax, filler=-1.0), 1.0),
            (encode, -float(_CODEBOOKS[bits][0][0])),
        ]
        return self._by_blocks(x, lambda b: encode_exactly(b, decode, encode, others))

    @functools.partial(jax.jit, static_argnums=(0, 3, 4))
    def decode(
        self,
        codes: Shaped[Array, "*codes"],
        absmax: Float32[Array, "*blocks"],
        shape: tuple[int, ...],
        spec: PartitionSpec | None = None,
    ) -> Float32[Array, "*shape"]:
        """The inverse of `encode`.

        Args:
            codes: of the array.
            absmax: of its blocks.
            shape: of the array.
            spec: how it lies on a mesh with explicit axes; by default as ``codes``.
        """
        spec = explicit_spec(codes) if spec is None else spec
        if spec is None:
            return self._decode(codes, absmax, shape)
        blocks = uncut_spec(shape, spec, self.block_size)

        def decode(codes, absmax):
            *rest, last = codes.shape
            if self.codes_shape(shape) != shape:  # Two a byte.
                last = min(2 * last, shape[-1])
            return self._decode(codes, absmax, (*rest, last))

        return on_shards(decode, (blocks, blocks), blocks, spec)(codes, absmax)

    def _decode(
        self, codes: jax.Array, absmax: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        layout = block_layout(shape, self.block_size)
        outer, n = shape[: layout.axis], math.prod(shape[layout.axis :])
        absmax = absmax.reshape(*outer, -1)
        rows = codes.reshape(*outer, -1)
        bits = self._bits(shape)
        per_block = layout.size // 2 if bits == 4 else layout.size
        pad = [(0, 0)] * len(outer) + [(0, -rows.shape[-1] % per_block)]
        blocks = jnp.pad(rows, pad).reshape(*outer, -1, per_block)
        values = _decode(blocks, absmax, bits, layout.size)
        return values.reshape(*outer, -1)[..., :n].reshape(shape)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of an array of ``shape``."""
        if not shape or self._bits(shape) != 4:
            return shape
        return (*shape[:-1], -(-shape[-1] // 2))

    def _by_shards(self, encode: Callable[[jax.Array], Any], x: jax.Array):
        """The codes and absmax of an array, each device's blocks by themselves."""
        spec = explicit_spec(x)
        if spec is None:
            return encode(x)
        blocks = uncut_spec(x.shape, spec, self.block_size)
        # Codes of half the length may not split as the array does.
        codes = spec if self.codes_shape(x.shape) == x.shape else blocks
        return on_shards(encode, (blocks,), (blocks, blocks), (codes, blocks))(x)

    def _by_blocks(self, x: jax.Array, encode: Callable[[jax.Array], Any]):
        """The codes and absmax of an array by a function of blocks, one a row."""
        layout = block_layout(x.shape, self.block_size)
        rows = x.reshape(*x.shape[: layout.axis], -1)
        n = rows.shape[-1]
        pad = [(0, 0)] * (rows.ndim - 1) + [(0, -n % layout.size)]
        blocks = jnp.pad(rows, pad).reshape(*rows.shape[:-1], -1, layout.size)
        codes, absmax = encode(blocks)
        shape = self.codes_shape(x.shape)
        stored = math.prod(shape[layout.axis :])
        codes = codes.reshape(*rows.shape[:-1], -1)[..., :stored]
        return codes.reshape(shape), absmax.reshape(layout.absmax_shape)

    def _bits(self, shape: tuple[int, ...]) -> Any:
        layout = block_layout(shape, self.block_size)
        # Two codes of a byte must be of one block, and of one row of the codes.
        odd = layout.size % 2 or (layout.axis < len(shape) - 1 and shape[-1] % 2)
        return 8 if self.state_bits == 4 and odd else self.state_bits


def _encode(blocks: jax.Array, bits: Any):
    if bits == "fp8":
        return _encode_fp8(blocks, _blocks.absmax_of_finite(blocks))
    return _encode_dynamic(blocks, bits)


def _decode(blocks: jax.Array, absmax: jax.Array, bits: Any, size: int):
    if bits == "fp8":
        return blocks.astype(jnp.float32) * (absmax / _FP8_MAX)[..., None]
    return _decode_dynamic(blocks, absmax, bits, size)


def _encode_dynamic(blocks: jax.Array, bits: int):
    even = blocks.shape[-1] + blocks.shape[-1] % 2
    signed, unsigned = (
        quantize_blockwise(blocks, book, block_size=even) for book in _CODEBOOKS[bits]
    )
    codes, absmax = signed[0], signed[1][..., 0]
    positive_codes = _keep_positive(unsigned[0], blocks, bits)
    nonnegative = jnp.min(blocks, axis=-1) >= 0
    codes = jnp.where(nonnegative[..., None], positive_codes, codes)
    return codes, jnp.where(nonnegative, -absmax, absmax)


def _decode_dynamic(blocks: jax.Array, absmax: jax.Array, bits: int, size: int):
    signed, unsigned = (
        dequantize_blockwise(
            blocks,
            jnp.abs(absmax)[..., None],
            book,
            block_size=size + size % 2,
            size=size,
        )
        for book in _CODEBOOKS[bits]
    )
    return jnp.where(jnp.signbit(absmax)[..., None], unsigned, signed)


def _keep_positive(codes: jax.Array, blocks: jax.Array, bits: int) -> jax.Array:
    """The smallest level instead of zero, which is code 0, for what is above zero."""
    if bits == 8:
        return jnp.maximum(codes, (blocks > 0).astype(jnp.uint8))
    high, low = (
        jnp.maximum(c, (x > 0).astype(jnp.uint8))
        for c, x in ((codes >> 4, blocks[..., 0::2]), (codes & 15, blocks[..., 1::2]))
    )
    return high << 4 | low


def _encode_fp8(blocks: jax.Array, absmax: jax.Array):
    scale = jnp.where(absmax > 0, _FP8_MAX / absmax, 0.0)
    codes = (blocks * scale[..., None]).astype(jnp.float8_e4m3fn)
    lost = (blocks != 0) & (codes.astype(jnp.float32) == 0)
    tiny = jnp.copysign(_FP8_TINY, blocks).astype(jnp.float8_e4m3fn)
    return jnp.where(lost, tiny, codes), absmax
