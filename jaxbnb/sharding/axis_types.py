"""Automatic and explicit axes of a mesh. In functions of models, they are automatic.

Types of arrays say how explicit axes divide them, and JAX refuses what it cannot derive
such a type for, as when tokens index an embedding.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.core
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

_Call = TypeVar("_Call", bound=Callable[..., Any])


def has_explicit(mesh: Any) -> bool:
    """Whether a mesh has explicit axes.

    Example:
        >>> import jax
        >>> has_explicit(jax.make_mesh((1,), ("data",), (AxisType.Explicit,)))
        True
    """
    return AxisType.Explicit in (mesh.axis_types or ())


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
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            assert isinstance(x.sharding.mesh, Mesh)
            return make_automatic(x.sharding.mesh)
    return None


def make_automatic(mesh: Any) -> Mesh:
    """Returns the mesh with automatic axes, which XLA divides arrays along.

    Example:
        >>> import jax
        >>> make_automatic(jax.make_mesh((1,), ("data",))).axis_types
        (Auto,)
    """
    return Mesh(mesh.devices, mesh.axis_names)


def follow_context(mesh: Mesh) -> Mesh:
    """Returns the mesh for a new model: with the kinds of axes that the context has.

    With automatic axes, unless the context's mesh is the same and has explicit ones.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> with jax.set_mesh(mesh):
        ...     follow_context(mesh).axis_types
        (Explicit,)
    """
    context, mesh = jax.sharding.get_mesh(), make_automatic(mesh)
    same = has_explicit(context) and make_automatic(context) == mesh
    return context if same else mesh


def without_explicit() -> AbstractContextManager:
    """Returns a context without a mesh, if the present one has explicit axes.

    Example:
        >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))), without_explicit():
        ...     jax.sharding.get_mesh().empty
        True
    """
    if not has_explicit(jax.sharding.get_abstract_mesh()):
        return contextlib.nullcontext()
    return jax.set_mesh(None)


def change_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Returns arrays with the same division on a mesh with other kinds of axes.

    Nothing is copied.

    Args:
        tree: pytree of arrays. Those that are not on a mesh stay as they are.
        mesh: the same mesh, with other kinds of axes. None changes nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> x = jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec("data")))
        >>> change_mesh(x, make_automatic(mesh)).sharding.mesh.axis_types
        (Auto,)
    """

    def change(x: Any) -> Any:
        old = getattr(x, "sharding", None)
        if not isinstance(old, NamedSharding) or mesh in (None, old.mesh):
            return x
        new = NamedSharding(mesh, old.spec, memory_kind=old.memory_kind)
        return jax.device_put(x, new)

    return jax.tree.map(change, tree)


@contextlib.contextmanager
def change_in_place(model: nnx.Module, *others: Any) -> Iterator[None]:
    """Returns a context for functions that change a model, where axes are automatic.

    In the context of a mesh with explicit axes, arrays are on automatic ones until it
    ends.

    Args:
        model: an NNX model.
        *others: random streams or modules that the function uses.

    Example:
        >>> with change_in_place(nnx.Linear(4, 4, rngs=nnx.Rngs(0))):
        ...     pass
    """
    mesh = find_mesh(model)
    context = jax.sharding.get_abstract_mesh()
    if mesh is None or not has_explicit(context):
        yield
        return
    explicit = follow_context(mesh)
    changed = [x for x in (model, *others) if _is_explicit(x)]
    _change_modules(changed, mesh)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _change_modules(changed, explicit)


def _is_explicit(module: Any) -> bool:
    leaves = jax.tree.leaves(nnx.state(module))
    return any(has_explicit(jax.typeof(x).sharding.mesh) for x in leaves)


def _change_modules(modules: Sequence[Any], mesh: Mesh) -> None:
    for module in modules:
        nnx.update(module, change_mesh(nnx.state(module), mesh))


def on_automatic_axes(function: _Call) -> _Call:
    """Decorates a function of a model: explicit axes are automatic within it.

    In the context of a mesh with explicit axes, results are divided like its arguments:
    a ``cache`` as it was, and rows as those of the first array. Everything else is on
    all devices. In another context, the function is the same as before.

    Args:
        function: method of a model, or function with a model as the first argument. Its
            result may be a pair of an array and the new ``cache``.

    Example:
        >>> import jax.numpy as jnp
        >>> @on_automatic_axes
        ... def multiply(layer, x):
        ...     return layer(x)
        >>> layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> with jax.set_mesh(jax.make_mesh((1,), ("fsdp",))):
        ...     x = jax.device_put(jnp.ones((2, 4)), PartitionSpec("fsdp"))
        ...     jax.typeof(multiply(layer, x)).sharding.spec
        P('fsdp', None)
    """

    @functools.wraps(function)
    def call(model, *args, **options):
        context = jax.sharding.get_abstract_mesh()
        if not has_explicit(context):
            return function(model, *args, **options)
        graphdef, state = nnx.split(model)
        arguments = args, options
        axes = dict.fromkeys(context.explicit_axes, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(context.update_axis_types(axes)):
            state = jax.tree.map(_make_automatic, state)
            # A copy, as a module that a transformation captures cannot be changed.
            copy = nnx.merge(graphdef, state)
            # Kept apart, because the copy may share its variables with the state.
            streams = jax.tree.leaves(nnx.filter_state(state, nnx.RngState))
            args, options = jax.tree.map(_make_automatic, arguments)
            result = function(copy, *args, **options)
        _update_rngs(model, streams, copy)
        return _divide_like(arguments, result)

    return call  # type: ignore[return-value]


def divide_rows(x: Array, rows: Array, axis: int = 0) -> Array:
    """Divides an axis along explicit axes as the first axis of ``rows`` is.

    On automatic axes, or without a mesh, nothing changes; nor does an array that lacks
    the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.set_mesh(jax.make_mesh((1,), ("fsdp",))):
        ...     rows = jax.device_put(jnp.ones((2, 4)), PartitionSpec("fsdp"))
        ...     jax.typeof(divide_rows(jnp.ones((3, 2)), rows, axis=1)).sharding.spec
        P(None, 'fsdp')
    """
    sharding = jax.typeof(rows).sharding
    if x.ndim <= axis or not has_explicit(sharding.mesh):
        return x
    spec = PartitionSpec(*[None] * axis, *sharding.spec[:1])
    return jax.sharding.reshard(x, spec)


def check_axes(module: nnx.Module) -> None:
    """Checks that no array of a model is divided along explicit axes.

    Args:
        module: a language model or another model of `jaxbnb.models`, or a part of it.

    Raises:
        ValueError: an array is. The context's mesh has no explicit axes then, because
            `on_automatic_axes` would have made them automatic.

    Example:
        >>> from flax import nnx
        >>> check_axes(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    """
    context = jax.sharding.get_abstract_mesh()
    for x in filter(_is_array, jax.tree.leaves(nnx.state(module))):
        sharding = jax.typeof(x).sharding
        if has_explicit(sharding.mesh) and (any(sharding.spec) or not context.empty):
            raise ValueError(
                f"an array of shape {x.shape} is on a mesh with explicit axes, "
                f"{tuple(sharding.mesh.axis_names)}, and they are not those of the "
                "context. Call this within jax.set_mesh(mesh); or put the model on "
                "automatic axes, with jaxbnb.sharding.shard_model(model, mesh) outside "
                "jax.set_mesh"
            )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def _make_automatic(x: Any) -> Any:
    if _is_array(x) and has_explicit(jax.typeof(x).sharding.mesh):
        return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim))
    return x


def _update_rngs(model: nnx.Module, old: Sequence[Array], copy: nnx.Module) -> None:
    """Takes over the random streams that a copy of a model has drawn from.

    Args:
        model: the model.
        old: arrays of its random streams before the copy was called.
        copy: the copy.
    """
    new = nnx.state(copy, nnx.RngState)
    if any(x is not y for x, y in zip(old, jax.tree.leaves(new), strict=True)):
        nnx.update(model, jax.tree.map(_put_everywhere, new))


def _divide_like(arguments: tuple[Any, dict[str, Any]], result: Any) -> Any:
    """Divides results along explicit axes, as `on_automatic_axes` says."""
    args, options = arguments
    cache = options.get("cache")
    if cache is not None:
        result, new = result
        new = jax.tree.map(
            lambda x, old: jax.sharding.reshard(x, jax.typeof(old).sharding.spec),
            new,
            cache,
        )
        return _divide_like((args, {}), result), new
    first = next(filter(_is_array, jax.tree.leaves((args, options))), None)
    rows = () if first is None else jax.typeof(first).sharding.spec[:1]

    def divide(x: Array) -> Array:
        if x.ndim < 2 or first is None or len(x) != len(first):
            return _put_everywhere(x)
        return jax.sharding.reshard(x, PartitionSpec(*rows))

    return jax.tree.map(divide, result)


def _put_everywhere(x: Array) -> Array:
    return jax.sharding.reshard(x, PartitionSpec())
