"""Where activations lie, and weights while they are used, by logical names.

Each function returns its argument outside a mesh with automatic axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxbnb.core import QuantizedArray
from jaxbnb.core.parts import make_even_spec, map_parts
from jaxbnb.sharding.layout import MESH_AXES, Division, divide, find_layout

# Axes along which each device has other rows of a batch.
BATCH_AXES: Final = ("data", "fsdp")


def constrain(x: Array, *names: str | None) -> Array:
    """Says which logical axes an activation has, so that devices divide it by them.

    Args:
        x: activation. With a batch that is not divided, JAX decides.
        *names: logical name of each axis: "batch", "heads", "mlp" or "vocab", or None
            for an axis that is not divided. Along "group", devices that share weights
            have the same rows; "spread_vocab" are logits that these devices share.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    mesh = _get_mesh()
    if mesh is None or ("batch" in names and not divides_batch(x)):
        return x
    layout = find_layout(_automatic(mesh))
    axes = {"batch": BATCH_AXES, "group": BATCH_AXES[:1], **layout.axes}
    axes["spread_vocab"] = (*axes["vocab"], *layout.spread)
    division = [
        tuple(a for a in axes.get(name or "", ()) if a in _automatic(mesh))
        for name in names
    ]
    spec = make_even_spec(x.shape, [a or None for a in division], mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_axes(mesh: Any) -> tuple[str, ...] | None:
    """Returns the axes of a mesh that divide the rows of a batch.

    None if the names of its axes do not say so: see `MESH_AXES`.

    Example:
        >>> batch_axes(jax.make_mesh((1, 1), ("fsdp", "tensor")))
        ('fsdp',)
    """
    if not set(mesh.axis_names) <= set(MESH_AXES):
        return None
    return tuple(a for a in BATCH_AXES if a in mesh.axis_names)


def divides_batch(x: Array) -> bool:
    """Whether each device of the context's mesh should have whole rows of a batch.

    Not if rows have a single token: that is less to send than the codes that multiply
    it, so devices multiply by their own codes.

    Args:
        x: activation or tokens, ``(batch, seq, ...)``.

    Example:
        >>> import jax.numpy as jnp
        >>> divides_batch(jnp.ones((2, 3)))
        False
    """
    mesh = _get_mesh()
    if mesh is None or x.shape[1] == 1:
        return False
    return len(x) % _count_batch_parts(mesh) == 0


def rows_of_device(x: Array) -> int:
    """Returns how many rows of a batch a device of the context's mesh has.

    Args:
        x: activation with the batch first.

    Example:
        >>> import jax.numpy as jnp
        >>> rows_of_device(jnp.ones((2, 3)))
        2
    """
    return len(x) // _count_batch_parts(_get_mesh()) if divides_batch(x) else len(x)


def count_vocab_parts() -> int:
    """Returns how many devices share the logits of a token.

    Example:
        >>> count_vocab_parts()
        1
    """
    mesh = _get_mesh()
    if mesh is None:
        return 1
    layout = find_layout(_automatic(mesh))
    axes = (*layout.axes["vocab"], *layout.spread)
    return math.prod(mesh.shape[a] for a in axes)


def look_up(embedding: Array, token_ids: Array) -> Array | None:
    """Returns rows of an embedding that is spread over devices along the vocabulary.

    Each device looks for its own rows, and the devices send the rows that they find. It
    is None where that is more than the embedding, or where nothing is spread.

    Args:
        embedding: the embedding, ``(vocab, hidden)``.
        token_ids: tokens, ``(batch, seq)``.

    Example:
        >>> import jax.numpy as jnp
        >>> look_up(jnp.ones((4, 2)), jnp.zeros((1, 3), int)) is None
        True
    """
    mesh = _get_mesh()
    if mesh is None or token_ids.size > embedding.shape[0]:
        return None
    layout = find_layout(_automatic(mesh))
    rows = divide(
        ("embed_tokens", "embedding"), embedding, layout, mesh, is_frozen=True
    )
    if not layout.spread or rows[1] or not set(layout.spread) <= set(rows[0]):
        return None
    batch = tuple(a for a in BATCH_AXES if a in _automatic(mesh))
    group = tuple(a for a in batch if a not in layout.spread)
    others = tuple(a for a in rows[0] if a not in layout.spread)

    def look_up(part, token_ids):
        start = jax.lax.axis_index(rows[0]) * len(part)
        is_here = (token_ids >= start) & (token_ids < start + len(part))
        found = part.at[jnp.where(is_here, token_ids - start, 0)].get(mode="clip")
        found = jnp.where(is_here[..., None], found, jnp.zeros_like(found))
        found = jax.lax.psum(found, others) if others else found
        return jax.lax.psum_scatter(
            found, layout.spread, scatter_dimension=0, tiled=True
        )

    return jax.shard_map(
        look_up,
        mesh=mesh,
        in_specs=(PartitionSpec(rows[0]), PartitionSpec(group or None)),
        out_specs=PartitionSpec(batch),
        axis_names={*batch, *rows[0]},
        check_vma=False,
    )(embedding, token_ids)


def shares_experts(count: int) -> bool:
    """Whether devices of the context's mesh have some of the experts each.

    Args:
        count: number of experts.

    Example:
        >>> shares_experts(8)
        False
    """
    mesh = _get_mesh()
    if mesh is None or "expert" not in _automatic(mesh):
        return False
    return count % mesh.shape["expert"] == 0


def sum_experts(
    function: Callable[..., Array], experts: tuple[Any, Any], x: Array
) -> Array:
    """Returns ``function(*experts, x)``, a sum over experts that devices share.

    Args:
        function: the sum over the experts that it gets.
        experts: two trees of arrays that have the experts first; see `shares_experts`.
        x: activation that all experts get.

    Example:
        >>> import jax.numpy as jnp
        >>> weights = jnp.ones((3, 2)), jnp.ones(3)
        >>> mesh = jax.make_mesh((1,), ("expert",), (AxisType.Auto,))
        >>> with jax.set_mesh(mesh):
        ...     sum_experts(lambda w, b, x: (w * x).sum(), weights, jnp.ones(2))
        Array(6., dtype=float32)
    """

    def add_part(experts, x):
        return jax.lax.psum(function(*experts, x), "expert")

    return jax.shard_map(
        add_part,
        in_specs=(PartitionSpec("expert"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"expert"},
        check_vma=False,
    )(experts, x)


def gather(module: nnx.Module) -> None:
    """Gathers the weights of a layer that are spread over devices, just before its use.

    Codes are gathered as codes. What comes back, in the backward pass, are sums of
    gradients that are scattered to where the weights were.

    Args:
        module: layer inside a function that is traced; its variables are replaced.

    Example:
        >>> from flax import nnx
        >>> gather(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    """
    mesh = _get_mesh()
    layout = None if mesh is None else find_layout(_automatic(mesh))
    if mesh is None or layout is None or not layout.spread:
        return
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value: Any = variable.get_raw_value()
        if value.ndim < 2:
            continue
        parts = tuple(map(str, path))
        own = divide(parts, value, layout, mesh, is_frozen=True)
        used = divide(parts, value, layout.gathered(), mesh, is_frozen=True)
        if own == used:
            continue
        if isinstance(value, QuantizedArray):
            new = map_parts(value, used, lambda x, names: _place(x, names, mesh))
        elif jnp.issubdtype(value.dtype, jnp.floating):
            new = _gather(value, used, own, mesh)
        else:
            new = _place(value, used, mesh)
        variable.set_value(new)


def gathered(module: nnx.Module) -> nnx.Module:
    """Returns a copy of a module without random streams, with its weights gathered.

    Args:
        module: module outside of a scan, such as what comes before the layers.

    Example:
        >>> from flax import nnx
        >>> gathered(nnx.Linear(4, 4, rngs=nnx.Rngs(0))).kernel.shape
        (4, 4)
    """
    copy = nnx.clone(module)
    gather(copy)
    return copy


def _gather(x: Array, used: Division, own: Division, mesh: Any) -> Array:
    @jax.custom_vjp
    def gather(x):
        return _place(x, used, mesh)

    def forward(x):
        return gather(x), None

    def backward(_, dy):
        return (_place(dy, own, mesh),)

    gather.defvjp(forward, backward)
    return gather(x)


def _place(x: Array, names: Sequence[Any], mesh: Any) -> Array:
    spec = make_even_spec(x.shape, [a or None for a in names], mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _get_mesh() -> Any:
    """Returns the context's mesh if it has automatic axes that we know, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not _automatic(mesh) else mesh


def _automatic(mesh: Any) -> tuple[str, ...]:
    """Returns the automatic axes; none if any axis of the mesh has another name.

    Only the mesh's owner knows what such an axis is for.
    """
    if not set(mesh.axis_names) <= set(MESH_AXES):
        return ()
    return tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )


def _count_batch_parts(mesh: Any) -> int:
    return math.prod(mesh.shape[a] for a in BATCH_AXES if a in _automatic(mesh))
