"""Blocks of arrays on a mesh, where each device holds and computes its own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbnb_kernels.update_8bit import block_layout


def explicit_spec(x: Any) -> PartitionSpec | None:
    """The spec of an array on a mesh with explicit axes; None if it is not on one.

    Raises:
        ValueError: it is on one, and the context has no mesh.
    """
    shape = isinstance(x, jax.ShapeDtypeStruct)
    sharding = x.sharding if shape else jax.typeof(x).sharding
    if not isinstance(sharding, NamedSharding):
        return None
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            f"an array of shape {x.shape} is on a mesh with explicit axes, "
            f"{sharding.mesh.shape}, but the context has no mesh: call this within "
            "jax.set_mesh(mesh)"
        )
    return PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))


def automatic_sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh with automatic axes; None if it is not on one.

    Also None for a traced array, for which XLA chooses.
    """
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or explicit_spec(x) is not None:
        return None
    spec = PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, spec)


def uncut_spec(
    shape: tuple[int, ...],
    spec: PartitionSpec,
    block_size: int,
    mesh: Any = None,
) -> PartitionSpec:
    """The nearest spec that does not cut a block, for the array and its absmax.

    The axis that blocks run along stays split if whole blocks fill each device's part.
    Otherwise it is gathered, as are the axes within a block.

    Args:
        shape: shape of the array.
        spec: spec of the array.
        block_size: largest number of elements in a block; see `block_layout`.
        mesh: mesh of the spec; None for the context's.
    """
    layout = block_layout(shape, block_size)
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape

    def keeps(axis: int) -> bool:
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        parts = math.prod(sizes[name] for name in names if name is not None)
        fills = (shape[axis] // parts) % layout.step == 0
        return axis < layout.axis or (axis == layout.axis and fills)

    return PartitionSpec(*(s if keeps(i) else None for i, s in enumerate(spec)))


def place(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """Splits the array by ``spec``; leaves it as it is if that is None."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def on_shards(
    fn: Callable, in_specs: Any, out_specs: Any, final_specs: Any
) -> Callable:
    """A function that calls ``fn`` on each device's part of its arguments.

    Args:
        fn: function from arrays to arrays.
        in_specs: specs of its arguments.
        out_specs: specs of its results.
        final_specs: specs that the results have in the end.
    """

    def call(*args):
        # The loops inside start from constants, which vary over no axis.
        results = jax.shard_map(
            fn, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )(*_place_all(args, in_specs))
        return _place_all(results, final_specs)

    return call


def _place_all(tree: Any, specs: Any) -> Any:
    return jax.tree.map(
        lambda spec, subtree: jax.tree.map(lambda x: place(x, spec), subtree),
        specs,
        tree,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
