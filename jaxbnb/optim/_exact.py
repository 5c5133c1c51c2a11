"""Encoding that gives back the codes and the absmax of what was decoded from them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxbnb_kernels import blockwise

Encoded = tuple[Any, Any]
Encode = Callable[[Any, Any], Encoded]


def encode_exactly(
    blocks: Float32[Array, "*blocks size"],
    decode: Callable[[Any, Any], Any],
    encode: Encode,
    others: Sequence[tuple[Encode, float]],
) -> Encoded:
    """Codes and absmax of blocks, to the nearest level, and exact where that can be.

    The largest magnitude of a decoded block need not be the absmax that it was decoded
    with. The signed dynamic maps have no -1: a block whose largest element was negative
    comes back 0.7% smaller (11% in 4 bits), and would again with every round trip. So
    other ways are tried, and the first holds by which each element of the block decodes
    to itself. Without one it is encoded as a step does it.

    Args:
        blocks: one a row.
        decode: ``decode(codes, absmax)``.
        encode: ``encode(blocks, absmax)``: codes, and the absmax to store; as a step
            does it, where the absmax is the largest magnitude.
        others: more of them, each with what its largest level is of the absmax.
    """
    largest = blockwise.absmax(blocks)
    codes, absmax = encode(blocks, largest)
    exact = jnp.all(decode(codes, absmax) == blocks, axis=-1)
    for other, level in others:

        def attempt(best, tried, other=other):
            codes, absmax, exact = best
            new_codes, new_absmax = other(blocks, tried)
            same = jnp.all(decode(new_codes, new_absmax) == blocks, axis=-1)
            better = same & ~exact
            codes = jnp.where(better[..., None], new_codes, codes)
            absmax = jnp.where(better, new_absmax, absmax)
            return (codes, absmax, exact | same), None

        near = _near(largest / jnp.float32(level))
        (codes, absmax, exact), _ = jax.lax.scan(attempt, (codes, absmax, exact), near)
    return codes, absmax


def _near(x: Float32[Array, "*blocks"]) -> Float32[Array, "7 *blocks"]:
    """The seven floats around a quotient, the nearest first.

    It is at most two steps from the absmax of which its dividend was a rounded product:
    three in fp8, where a level is rounded twice, or on a device that divides coarsely.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    steps = jnp.asarray([0, -1, 1, -2, 2, -3, 3], jnp.int32)
    # Neighbours in bits are neighbours in size; below zero there is none.
    near = jnp.maximum(bits + steps.reshape(-1, *(1 for _ in x.shape)), 0)
    return jax.lax.bitcast_convert_type(near, jnp.float32)
