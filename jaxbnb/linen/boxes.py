"""Linen's boxes around weights, such as nn.Partitioned: taken off and put on."""

from collections.abc import Callable
from typing import Any

import jax
from flax.core.meta import AxisMetadata, is_axis_metadata

from jaxbnb.core import QuantizedArray
from jaxbnb.core.contraction import KernelAxes
from jaxbnb.core.parts import apply_or_eval_shape, array_axes, map_parts, shard_like


def take_out(tree: Any) -> Any:
    """Returns the tree without its boxes.

    Unlike ``nn.unbox``, it does not constrain the sharding of the values, which may be
    abstract.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> take_out({"kernel": nn.Partitioned(jnp.ones(2), names=("data",))})
        {'kernel': Array([1., 1.], dtype=float32)}
    """

    def value(leaf: Any) -> Any:
        if isinstance(leaf, AxisMetadata):
            # The value may be another box, but it has only one leaf.
            (leaf,) = jax.tree.leaves(leaf)
        return leaf

    return jax.tree.map(value, tree, is_leaf=is_axis_metadata)


def put_in(tree: Any, values: Any) -> Any:
    """Puts other values into the boxes of a tree, which inverts `take_out`.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> box = nn.Partitioned(jnp.ones(2), names=("data",))
        >>> put_in(box, jnp.zeros(2)).names
        ('data',)
    """
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(values))


def quantize_boxed(
    weight: Any,
    quantize: Callable[[Any], QuantizedArray],
    axes: KernelAxes | None = None,
) -> QuantizedArray:
    """Quantises a weight, and puts each part in a box like the weight's.

    So ``nn.get_partition_spec`` gives a spec for each part, ``nn.unbox`` takes all
    boxes off, and ``nn.scan`` and ``nn.vmap`` name the axis that they stack along.

    Args:
        weight: array or its shape; it may be in a box, a `flax.core.meta.AxisMetadata`
            with a name for each axis.
        quantize: function that quantises an array.
        axes: axes of a kernel that is stored as matrices; None to leave its shape.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, jaxbnb
        >>> kernel = nn.Partitioned(jnp.ones((64, 32)), names=("embed", "mlp"))
        >>> q = quantize_boxed(kernel, jaxbnb.QuantConfig().quantize_kernel)
        >>> q.codes.names, q.absmax.names
        (('mlp', 'embed'), ('mlp', 'embed'))
    """
    array = take_out(weight)

    def quantize_matrices(x):
        return quantize(x if axes is None else axes.to_matrices(x))

    def rename(names):
        if axes is None:
            return tuple(names)
        return axes.matrix_names(names, array.ndim - len(axes.shape))

    q = shard_like(apply_or_eval_shape(quantize_matrices, array), array, rename)
    if not isinstance(weight, AxisMetadata):
        return q
    names = rename(_names(weight) or ())
    return map_parts(q, names, lambda part, names: _rebox(weight, part, names))


def dequantize_boxed(
    q: QuantizedArray,
    dtype: jax.typing.DTypeLike | None = None,
    axes: KernelAxes | None = None,
) -> Any:
    """Inverts `quantize_boxed`; the first of several flattened axes gets the name."""

    def decode(q):
        x = q.dequantize(dtype)
        return x if axes is None else axes.to_kernel(x)

    plain = take_out(q)
    weight = apply_or_eval_shape(decode, plain)
    box: Any = q.codes
    if not isinstance(box, AxisMetadata):
        return weight
    names = array_axes(plain, _names(box) or (None,) * plain.ndim)
    return _rebox(box, weight, names if axes is None else axes.kernel_names(names))


def _names(box: AxisMetadata) -> tuple[Any, ...] | None:
    """Returns the axis names of a box, or else of a box inside it."""
    names = getattr(box, "names", None)
    inside = getattr(box, "value", None)
    if names is None and isinstance(inside, AxisMetadata):
        return _names(inside)
    return names


def _rebox(box: Any, value: Any, names: tuple[Any, ...]) -> Any:
    """Replaces the value of a box and, if it names axes, their names."""
    inside = getattr(box, "value", None)
    if getattr(box, "names", None) is not None:
        box = box.replace(names=names)
    if isinstance(inside, AxisMetadata):
        return box.replace(value=_rebox(inside, value, names))
    return box.replace_boxed(value)
