"""The mesh that arrays are on, and contexts for it."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb.core.processes import put
from jaxbnb.sharding.activations import batch_axes
from jaxbnb.sharding.axis_types import find_mesh, follow_context, make_automatic
from jaxbnb.sharding.layout import use_preset
from jaxbnb.sharding.specs import Sharding, make_shardings, partition_specs


def use_mesh(where: Any) -> AbstractContextManager:
    """Returns a context in which a model on a mesh says where its activations lie.

    Call a model within it, or compile it there. Without it, JAX alone decides, and
    devices may send activations to each other where codes would be less. Functions that
    take a whole model, such as `jaxbnb.finetune.fit` and `jaxbnb.models.generate`, do
    this themselves.

    Args:
        where: a model or a tree of arrays; or the mesh. If it is not on a mesh, the
            context changes nothing.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> with use_mesh(layer):
        ...     y = layer(jnp.ones((2, 4)))
    """
    mesh = make_automatic(where) if isinstance(where, Mesh) else find_mesh(where)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def shard_model(model: nnx.Module, mesh: Mesh, sharding: Sharding = None) -> None:
    """Divides a model over a mesh, in place.

    `jaxbnb.load_pretrained` does so while it reads, without the whole model on one
    device.

    Args:
        model: an NNX model.
        mesh: the mesh. The axes of the model's arrays are automatic, or explicit if
            they are in the context (``jax.set_mesh``).
        sharding: see `partition_specs`.

    Raises:
        TypeError: see `partition_specs`.
        ValueError: see `partition_specs`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> model = nnx.Dict(up=nnx.Linear(64, 256, rngs=nnx.Rngs(0)))
        >>> shard_model(model, jax.make_mesh((1,), ("fsdp",)))
        >>> model["up"].kernel.sharding.mesh.axis_names
        ('fsdp',)
    """
    state = nnx.state(model)
    used = use_preset(mesh, sharding) if isinstance(sharding, str) else mesh
    specs = partition_specs(model, used, sharding)
    shardings = make_shardings(specs, follow_context(used))
    nnx.update(model, jax.device_put(state, shardings))


def place_like(tree: Any, like: Any) -> Any:
    """Returns a tree with each array on the mesh, as its counterpart is.

    Args:
        tree: pytree of arrays.
        like: tree of the same structure. Arrays that are not on a mesh have no effect.

    Example:
        >>> import jax.numpy as jnp
        >>> place_like([jnp.ones(3)], [jnp.ones(3)])[0].shape
        (3,)
    """

    def place(x: Any, old: Any) -> Any:
        home = getattr(old, "sharding", None)
        return jax.device_put(x, home) if isinstance(home, NamedSharding) else x

    return jax.tree.map(place, tree, like)


def place_rest(tree: Any, mesh: Mesh | None) -> Any:
    """Returns a tree with every array on the mesh: as it is there, or by axes' names.

    Args:
        tree: pytree of arrays, e.g. an ``nnx.State``.
        mesh: mesh with automatic axes; None returns the tree as it is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> place_rest([jnp.ones(3)], jax.make_mesh((1,), ("data",)))[0].sharding.spec
        P(None,)
    """
    if mesh is None:
        return tree
    if batch_axes(mesh) is None:
        specs = jax.tree.map(lambda _: PartitionSpec(), tree)
    else:
        specs = partition_specs(tree, mesh)

    def place(x: Any, new: NamedSharding) -> Any:
        old = x.sharding
        if isinstance(old, NamedSharding):
            new = NamedSharding(
                make_automatic(old.mesh), old.spec, memory_kind=old.memory_kind
            )
        return put(x, new)

    return jax.tree.map(place, tree, make_shardings(specs, mesh))
