"""How optimizer state is held in few bits.

`StatePolicy` decides which state is quantised, from defaults, overrides by path and
what parameters declare. `StateFormat` holds one array as codes and absmax, on a mesh
too. Both serve every optimizer. An elementwise rule knows the sign of its moments, and
its step decodes and encodes them in one pass (`jaxbnb_kernels.update_8bit`).
`quantize_state` knows neither and calls `StateFormat` around a step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Shaped

from jaxbnb.core.formats import check_block_size
from jaxbnb.optim import _codecs
from jaxbnb.optim._sharding import (
    automatic_sharding,
    explicit_spec,
    on_shards,
    place,
    uncut_spec,
)
from jaxbnb.optim.rules import Pattern, flatten_with_paths, keep_32_bits, match_paths
from jaxbnb_kernels.update_8bit import block_layout, reference

StateBits = Literal[4, 8, 32, "fp8"]
# The code of one in both dynamic maps of 8 bits.
_ONE_CODE = 255


@dataclasses.dataclass(frozen=True)
class StatePolicy:
    """Which state of a parameter is quantised, and how.

    Attributes:
        state_bits: 8 or 4 for the dynamic maps, "fp8" for e4m3, 32 for none of it.
        block_size: largest number of elements that share an absmax. None for 256, or
            128 in 4 bits.
        min_quantized_size: smaller arrays of state stay as they are.
    """

    state_bits: StateBits = 8
    block_size: int | None = None
    min_quantized_size: int = 4096

    def __post_init__(self):
        if self.min_quantized_size < 0:
            raise ValueError(
                f"min_quantized_size must be at least 0; got {self.min_quantized_size}"
            )
        self.format()

    def format(self, signed: bool | None = None) -> "StateFormat":
        """The format of what is quantised."""
        default = 128 if self.state_bits == 4 else 256
        size = default if self.block_size is None else self.block_size
        return StateFormat(self.state_bits, size, signed)

    def format_for(self, x: Any, signed: bool | None = None) -> "StateFormat":
        """The format of the state ``x``, which has 32 bits if it is not quantised."""
        format_ = self.format(signed)
        if self.quantizes(x):
            return format_
        return dataclasses.replace(format_, state_bits=32)

    def quantizes(self, x: Any) -> bool:
        """Whether the state ``x`` is quantised, by its dtype and size."""
        return (
            self.state_bits != 32
            and x.ndim > 0
            and jnp.issubdtype(x.dtype, jnp.floating)
            and math.prod(x.shape) >= max(self.min_quantized_size, 1)
        )


def policies_of(
    params: Any,
    default: StatePolicy,
    rules: Sequence[tuple[Pattern, StatePolicy]] = (),
) -> list[StatePolicy]:
    """The policy of every parameter.

    Args:
        params: parameters, in boxes if any of them declares its ``state_bits``.
        default: policy where no rule matches, except for a parameter that declares 32
            bits.
        rules: patterns of paths and the policies they lead to. The first match wins.

    Raises:
        ValueError: a rule decides for none of the parameters.
    """
    paths, _, _ = flatten_with_paths(params)
    chosen = match_paths(paths, [pattern for pattern, _ in rules])
    in_32_bits = dataclasses.replace(default, state_bits=32)
    return [
        rules[i][1] if i is not None else in_32_bits if kept else default
        for i, kept in zip(chosen, keep_32_bits(params), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """The format of one array of state.

    Attributes:
        state_bits: 8 or 4 for the dynamic maps, "fp8" for e4m3, 32 for as it is.
        block_size: largest number of elements that share an absmax.
        signed: whether the array takes the signed or the unsigned dynamic map. None to
            choose block by block.
    """

    state_bits: StateBits
    block_size: int
    signed: bool | None = None

    def __post_init__(self):
        if self.state_bits not in (4, 8, 32, "fp8"):
            raise ValueError(
                f"state_bits must be 8, 4, 'fp8' or 32; got {self.state_bits!r}"
            )
        check_block_size(self.block_size)

    @property
    def codes_dtype(self) -> Any:
        """The dtype of codes; float32 where there are none."""
        return {"fp8": jnp.float8_e4m3fn, 32: jnp.float32}.get(
            self.state_bits, jnp.uint8
        )

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of an array of ``shape``."""
        if not shape or self._bits(shape) != 4:
            return shape
        return (*shape[:-1], -(-shape[-1] // 2))

    def full(
        self, like: Any, value: jax.typing.ArrayLike
    ) -> tuple[Shaped[Array, "*shape"], Float32[Array, "*blocks"]]:
        """Codes and absmax of one value, in 8 bits of known sign.

        In 32 bits, float32 values and a single zero: Orbax does not save an array
        without elements. On a mesh, each device has the state of its own part.

        Args:
            like: array or ``jax.ShapeDtypeStruct`` with the shape and sharding.
            value: value of every element; must not be negative.
        """
        value = jnp.asarray(value, jnp.float32)
        shape, spec, home = like.shape, explicit_spec(like), automatic_sharding(like)
        if self.state_bits == 32:
            no_absmax = jnp.zeros((1,) * like.ndim, jnp.float32)
            return place(jnp.full(shape, value, device=home), spec), no_absmax
        code = jnp.where(value > 0, _ONE_CODE, reference.ZERO_CODE[bool(self.signed)])
        codes = jnp.full(shape, code.astype(jnp.uint8), device=home)
        if home is not None:
            blocks = uncut_spec(shape, home.spec, self.block_size, home.mesh)
            home = NamedSharding(home.mesh, blocks)
        absmax_shape = block_layout(shape, self.block_size).absmax_shape
        absmax = jnp.full(absmax_shape, value, device=home)
        if spec is not None:
            absmax = place(absmax, uncut_spec(shape, spec, self.block_size))
        return place(codes, spec), absmax

    # Jitted, so that arrays of one shape are traced once and not a hundred times.
    @functools.partial(jax.jit, static_argnums=0)
    def encode(
        self, x: Float32[Array, "*shape"]
    ) -> tuple[Shaped[Array, "*codes"], Float32[Array, "*blocks"]]:
        """The codes of an array and its absmax, each of the array's rank.

        Codes are uint8 or float8_e4m3fn, in the array's own shape. In 4 bits there are
        two in a byte, so the last axis is half as long. Where an odd last axis is
        shorter than a block, codes have 8 bits instead.
        """
        return self._encode(x, _codecs.encode)

    @functools.partial(jax.jit, static_argnums=0)
    def encode_exactly(
        self, x: Float32[Array, "*shape"]
    ) -> tuple[Shaped[Array, "*codes"], Float32[Array, "*blocks"]]:
        """As `encode`, but values from `decode` get their old codes and absmax."""
        return self._encode(x, _codecs.encode_exactly)

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
            codes: codes of the array.
            absmax: absmax of its blocks.
            shape: shape of the array.
            spec: layout of the array on a mesh with explicit axes; by default that of
                ``codes``.
        """
        spec = explicit_spec(codes) if spec is None else spec
        if spec is None:
            return self._decode(codes, absmax, shape)
        blocks = uncut_spec(shape, spec, self.block_size)

        def decode(codes, absmax):
            *rest, last = codes.shape
            if self.codes_shape(shape) != shape:  # Two in a byte.
                last = min(2 * last, shape[-1])
            return self._decode(codes, absmax, (*rest, last))

        return on_shards(decode, (blocks, blocks), blocks, spec)(codes, absmax)

    def _encode(self, x: jax.Array, encode: Callable[..., _codecs.Encoded]):
        """Codes and absmax of an array. Each device encodes its own blocks."""

        def encode_part(x):
            layout = block_layout(x.shape, self.block_size)
            rows = x.reshape(*x.shape[: layout.axis], -1)
            blocks = _in_blocks(rows, layout.size)
            codes, absmax = encode(blocks, self._bits(x.shape), self.signed)
            shape = self.codes_shape(x.shape)
            stored = math.prod(shape[layout.axis :])
            codes = codes.reshape(*rows.shape[:-1], -1)[..., :stored]
            return codes.reshape(shape), absmax.reshape(layout.absmax_shape)

        spec = explicit_spec(x)
        if spec is None:
            return encode_part(x)
        blocks = uncut_spec(x.shape, spec, self.block_size)
        # Codes of half the length may not split as the array does.
        codes = spec if self.codes_shape(x.shape) == x.shape else blocks
        return on_shards(encode_part, (blocks,), (blocks, blocks), (codes, blocks))(x)

    def _decode(
        self, codes: jax.Array, absmax: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        layout, bits = block_layout(shape, self.block_size), self._bits(shape)
        outer, n = shape[: layout.axis], math.prod(shape[layout.axis :])
        stored = layout.size // 2 if bits == 4 else layout.size
        blocks = _in_blocks(codes.reshape(*outer, -1), stored)
        absmax = absmax.reshape(*outer, -1)
        values = _codecs.decode(blocks, absmax, bits, layout.size, self.signed)
        return values.reshape(*outer, -1)[..., :n].reshape(shape)

    def _bits(self, shape: tuple[int, ...]) -> Any:
        layout = block_layout(shape, self.block_size)
        # Two codes of a byte must be in one block, and in one row of the codes.
        odd = layout.size % 2 or (layout.axis < len(shape) - 1 and shape[-1] % 2)
        return 8 if self.state_bits == 4 and odd else self.state_bits


def _in_blocks(rows: jax.Array, size: int) -> jax.Array:
    """Cuts rows into blocks along the last axis, the last one filled with zeros."""
    pad = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % size)]
    return jnp.pad(rows, pad).reshape(*rows.shape[:-1], -1, size)
