"""Puts a tensor of a checkpoint where it belongs in a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.processes import put
from jaxbnb.models._places import Place
from jaxbnb.models._sharding import make_layer_sharding
from jaxbnb_kernels.quantize_blockwise import quantize_absmax


def insert_tensor(
    place: Place,
    quant: QuantConfig | None,
    value: Any,
    tensor: np.ndarray | QuantizedArray,
    sharding: Any = None,
) -> Any:
    """Returns the value of a variable with one more tensor in it."""
    is_encoded = isinstance(tensor, QuantizedArray)
    if not place.index and (is_encoded or not isinstance(value, QuantizedArray)):
        if isinstance(tensor, QuantizedArray):
            if sharding is None:
                return jax.device_put(tensor)
            return jax.tree.map(put, tensor, sharding)
        tensor = place.flip(tensor) if place.is_kernel else tensor
        if sharding is None:
            return jnp.array(tensor, value.dtype)
        # Each device gets only its own part, and no process reads more.
        return put(tensor, sharding, value.dtype)
    quant = quant if isinstance(value, QuantizedArray) else None
    layer: Any = tensor
    everywhere = None
    if sharding is None:
        value = jax.tree.map(_allocate, value)
    else:
        value = jax.tree.map(_allocate, value, sharding)
        # Each device gets only its own part, and quantises it.
        single = make_layer_sharding(sharding, place, tensor)
        layer = jax.tree.map(put, tensor, single)
        mesh = jax.tree.leaves(sharding)[0].mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
    index = tuple(map(np.int32, place.index))
    value = _insert(value, layer, index, quant, place.is_kernel, everywhere)
    if sharding is not None:
        # The compiler may have chosen another sharding.
        value = jax.device_put(value, sharding)
    # Wait, or the next tensor would be read while this one is still being encoded.
    return jax.block_until_ready(value)


def count_nbytes(place: Place, tensor: Any, sharding: Any = None) -> int:
    """Counts the bytes of a tensor that the devices of this process need.

    Args:
        place: place of the tensor.
        tensor: see `insert_tensor`, also for the sharding.
        sharding: sharding of the variable; None for one device.
    """
    leaves = jax.tree.leaves(tensor)
    if sharding is None:
        return sum(x.nbytes for x in leaves)
    single = jax.tree.leaves(make_layer_sharding(sharding, place, tensor))
    total = 0
    for x, where in zip(leaves, single, strict=True):
        # Devices that hold the same part take it from one read.
        parts = {
            str(p): p for p in where.addressable_devices_indices_map(x.shape).values()
        }
        total += sum(x[part].nbytes for part in parts.values())
    return total


def _allocate(
    leaf: Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None
) -> Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _insert(
    stack: Any,
    tensor: Float[Array, "*shape"] | QuantizedArray,
    index: tuple[Int32[Array, ""], ...],
    quant: QuantConfig | None,
    is_kernel: bool,
    everywhere: NamedSharding | None,
) -> Any:
    """Writes a tensor into a stack, in place."""
    if isinstance(tensor, QuantizedArray):
        encoded = tensor
    else:
        tensor = (tensor.mT if is_kernel else tensor).astype(stack.dtype)
        encoded = tensor if quant is None else _encode(tensor, quant, everywhere)
    return jax.tree.map(lambda old, part: old.at[index].set(part), stack, encoded)


def _encode(
    kernel: Float[Array, "fan_in fan_out"],
    quant: QuantConfig,
    everywhere: NamedSharding | None,
) -> QuantizedArray:
    """Quantises a kernel, with the same bits on a mesh as on a single device.

    Args:
        kernel: the kernel.
        quant: the format.
        everywhere: sharding that copies an array to all of the mesh; None without one.
    """
    if everywhere is None or not quant.double_quant:
        return quant.quantize_kernel(kernel)
    single = dataclasses.replace(quant, double_quant=False)
    q = single.quantize_kernel(kernel)
    # The mean of divided absmax would add up the devices' sums, and round differently.
    absmax = jax.lax.with_sharding_constraint(q.absmax, everywhere)
    nested = jax.lax.with_sharding_constraint(quantize_absmax(absmax), everywhere)
    absmax, nested_absmax, offset = nested
    return dataclasses.replace(
        q, absmax=absmax, nested_absmax=nested_absmax, offset=offset
    )
