"""sharding_table and propose_mesh: bytes of each device."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxbnb.core import QuantizedArray
from jaxbnb.core.table import format_table
from jaxbnb.core.units import format_bytes
from jaxbnb.sharding.specs import Sharding, as_tuple, partition_specs, path_names


def sharding_table(tree: Any, mesh: Any, sharding: Sharding = None) -> str:
    """Returns a table of how a mesh divides each array, and its bytes on each device.

    Nothing is computed or moved.

    Args:
        tree: arrays or their shapes, or an NNX model; see `partition_specs`.
        mesh: the mesh, which may be abstract.
        sharding: see `partition_specs`.

    Returns:
        A line for each array, with the spec of the codes if it is quantised, and the
        total. The logical names of a quantised array's axes end with those of blocks.

    Raises:
        TypeError: see `partition_specs`.
        ValueError: see `partition_specs`.

    Example:
        >>> import jax, jaxbnb
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
        >>> w = jax.ShapeDtypeStruct((256, 128), "float32")
        >>> tree = {"scale": w.update(shape=(256,)),
        ...         "up": jaxbnb.quantize(w, "nf4", axis=-2)}
        >>> print(sharding_table(tree, mesh))
        array  shape       stored as  spec             bytes  a device
        scale  (256,)      float32    P(None)        1.0 KiB   1.0 KiB
        up     (256, 128)  nf4        P(fsdp, None)  18.0 KiB  4.5 KiB
        total                                        19.0 KiB  5.5 KiB
    """
    rows = [("array", "shape", "stored as", "spec", "bytes", "a device")]
    total = shared = 0
    for path, value, specs in _list_specs(tree, mesh, sharding):
        whole, part = _count_bytes(value, None, mesh), _count_bytes(value, specs, mesh)
        is_quantized = isinstance(value, QuantizedArray)
        kind = value.quant_type if is_quantized else np.dtype(value.dtype).name
        spec = specs.codes if is_quantized else specs
        shape = str(tuple(value.shape))
        rows.append(
            (path, shape, kind, _show(spec), format_bytes(whole), format_bytes(part))
        )
        total, shared = total + whole, shared + part
    rows.append(("total", "", "", "", format_bytes(total), format_bytes(shared)))
    return format_table(rows, num_right=2)


def device_bytes(tree: Any, mesh: Any, sharding: Sharding = None) -> int:
    """Returns the bytes of a tree on each device of a mesh.

    Args:
        tree: arrays or their shapes, or an NNX model; see `partition_specs`.
        mesh: the mesh, which may be abstract.
        sharding: see `partition_specs`.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
        >>> device_bytes({"w": jax.ShapeDtypeStruct((256, 128), "float32")}, mesh)
        32768
    """
    found = _list_specs(tree, mesh, sharding)
    return sum(_count_bytes(value, specs, mesh) for _, value, specs in found)


def propose_mesh(
    tree: Any, memory: int, devices: Sequence[Any] | int | None = None
) -> Mesh | AbstractMesh:
    """Proposes a mesh on which a tree of arrays fits, like ``device_map="auto"``.

    As few devices as possible share the weights, along the axis "fsdp", and the others
    repeat them, along "data": devices that share weights send them to each other in
    every step. Rows of a batch are divided along both.

    Args:
        tree: all that stays on the devices: weights, adapters and optimizer state, as
            arrays or shapes, or an NNX model. ``nnx.eval_shape`` makes one without
            memory.
        memory: bytes of a device for the tree. Leave room for activations, which
            `jaxbnb.plan` estimates.
        devices: the devices; None for all, and a number for an abstract mesh.

    Returns:
        A mesh with the axes "data" and "fsdp", which are automatic.

    Raises:
        ValueError: the tree does not fit on these devices; the message says what it
            needs.

    Example:
        >>> import jax
        >>> weights = {"w": jax.ShapeDtypeStruct((1024, 1024), "float32")}
        >>> dict(propose_mesh(weights, 2**21, devices=8).shape)
        {'data': 4, 'fsdp': 2}
    """
    if devices is None:
        devices = jax.devices()
    count = devices if isinstance(devices, int) else len(devices)
    names = ("data", "fsdp")
    needed: list[tuple[int, int]] = []
    for fsdp in (n for n in range(1, count + 1) if count % n == 0):
        sizes = count // fsdp, fsdp
        try:
            held = device_bytes(tree, AbstractMesh(sizes, names))
        except ValueError:
            continue
        if held > memory:
            needed.append((held, fsdp))
            continue
        if isinstance(devices, int):
            return AbstractMesh(sizes, names)
        return Mesh(np.asarray(devices).reshape(sizes), names)
    least, fsdp = min(needed)
    raise ValueError(
        f"{format_bytes(memory)} a device hold too little: divided among {fsdp} of "
        f"{count} devices, the arrays take {format_bytes(least)} on each. Use more "
        "devices or fewer bits"
    )


def _list_specs(tree: Any, mesh: Any, sharding: Sharding) -> list[tuple[str, Any, Any]]:
    """Lists the path, the value and the specs of each array."""
    specs = partition_specs(tree, mesh, sharding)
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree

    def is_leaf(x: Any) -> bool:
        return isinstance(x, QuantizedArray | PartitionSpec)

    values = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    found = jax.tree.leaves(specs, is_leaf=is_leaf)
    return [
        (".".join(path_names(path)), value, spec)
        for (path, value), spec in zip(values, found, strict=True)
        if hasattr(value, "dtype")
    ]


def _count_bytes(value: Any, specs: Any, mesh: Any) -> int:
    """Returns the bytes of an array on each device; all of them if it has no specs."""
    parts = jax.tree.leaves(value)
    if specs is None:
        found = [PartitionSpec()] * len(parts)
    else:
        found = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    total = 0
    for part, spec in zip(parts, found, strict=True):
        names = [name for axis in spec for name in as_tuple(axis)]
        count = math.prod(mesh.shape[name] for name in names)
        total += part.size * _itemsize(part.dtype) // count
    return total


def _itemsize(dtype: Any) -> int:
    # A random key is as large as its data: two numbers of 32 bits.
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _show(spec: PartitionSpec) -> str:
    axes = [" x ".join(as_tuple(axis)) if axis is not None else "None" for axis in spec]
    return f"P({', '.join(axes)})"
