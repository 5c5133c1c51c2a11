"""The mesh that arrays are on, and contexts for it."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding


def find_mesh(tree: Any) -> Mesh | None:
    """Returns the mesh that arrays are on, with automatic axes; None without one.

    Example:
        >>> import jax.numpy as jnp
        >>> find_mesh({"w": jnp.ones(3)}) is None
        True
    """
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.core.Tracer):
            return None
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return make_automatic(sharding.mesh)
    return None


def make_automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axes, which XLA divides arrays along.

    Example:
        >>> import jax
        >>> make_automatic(jax.make_mesh((1,), ("data",))).axis_types
        (Auto,)
    """
    return Mesh(mesh.devices, mesh.axis_names)


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
