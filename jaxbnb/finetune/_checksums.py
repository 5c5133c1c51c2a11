"""Checksums of arrays, which tell whether a checkpoint holds what was saved."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

_BITS: Final = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def array_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns a checksum of each array, the same however a mesh divides it.

    The devices compute it. Arrays in host memory are brought in one at a time.

    Example:
        >>> import jax.numpy as jnp
        >>> before = array_checksums({"x": jnp.zeros(4), "y": jnp.ones(4)})
        >>> after = array_checksums({"x": jnp.zeros(4), "y": jnp.ones(4).at[2].set(2)})
        >>> before["x"] == after["x"], before["y"] == after["y"]
        (True, False)
    """
    return {name: int(_checksum(_to_device(x))) for name, x in arrays.items()}


def json_digest(value: Any) -> str:
    """Returns a digest of plain values, as JSON has them."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _checksum(x: Shaped[Array, "*shape"]) -> UInt32[Array, ""]:
    """Sums a hash of each element and its place.

    The hash is a bijection of 32 bits for each place, so a change of one element always
    shows. One of several elements is missed with a chance of 2^-32. Sums of integers do
    not depend on their order, nor on how the array is divided.
    """
    is_whole = x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)
    if is_whole and x.dtype.itemsize == 1:
        # Those of 4 bits cannot be cast as bits.
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(1))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Scrambles bits, as the finaliser of MurmurHash3 does."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _to_device(x: jax.Array) -> jax.Array:
    if jax.typeof(x).memory_space != jax.memory.Space.Host:
        return x
    return jax.device_put(x, jax.memory.Space.Device)
