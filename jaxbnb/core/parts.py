"""The parts of a QuantizedArray: whether they are intact, and their axes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.core
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbnb.core import formats

PARTS: Final = ("codes", "absmax", "nested_absmax", "offset", "zero_point")


def check_parts(q: Any) -> None:
    """Raises TypeError if the parts of ``q`` were cast, averaged or updated.

    Codes are indices: casting or averaging every leaf of a tree gives numbers that only
    look like codes. A pytree cannot check its parts when it is constructed, because JAX
    puts placeholders there. So every function that uses the parts calls this one.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones(64), "nf4")
        >>> check_parts(q)
        >>> try:
        ...     check_parts(jax.tree.map(lambda x: x / 2, q))
        ... except TypeError as error:
        ...     print(str(error).partition(':')[0])
        a QuantizedArray in nf4 has codes in float32, not uint8
    """
    is_linear = formats.codebook(q.quant_type) is None
    dtypes = {
        "codes": np.dtype(np.int8 if is_linear else np.uint8),
        "absmax": np.dtype(np.uint8 if _has_8bit_absmax(q) else np.float32),
        "nested_absmax": np.dtype(np.float32),
        "offset": np.dtype(np.float32),
        "zero_point": np.dtype(np.uint8),
    }
    for name, dtype in dtypes.items():
        part = getattr(q, name)
        if part is None or getattr(part, "dtype", None) == dtype:
            continue
        if not hasattr(part, "dtype"):
            raise TypeError(
                f"a QuantizedArray in {q.quant_type} has a {type(part).__name__} "
                f"instead of its {name}. Take off Linen's boxes with "
                "flax.linen.unbox(variables); specs, masks and the like are not arrays"
            )
        raise TypeError(
            f"a QuantizedArray in {q.quant_type} has {name} in {part.dtype}, not "
            f"{dtype}: something cast, averaged or updated every leaf of its tree, and "
            "codes are indices. Load or quantise the weight again; then cast with "
            "jaxbnb.core.cast_floating(tree, dtype), and average or update only what "
            "is trained: nnx.state(model, nnx.Param), or the first tree of "
            "jaxbnb.linen.split_quantized(params)"
        )


def _has_8bit_absmax(q: Any) -> bool:
    scaled = formats.SCALED.get(q.quant_type)
    has_8bit_scales = scaled is not None and scaled.scale_type is not None
    return has_8bit_scales or q.nested_absmax is not None


def map_parts(
    q: Any, names: Sequence[Any], function: Callable[[Any, tuple[Any, ...]], Any]
) -> Any:
    """Replaces each part of ``q`` by ``function(part, names)``.

    Codes and absmax have the array's axes in the order in which they are stored: the
    axis that blocks run along is last. The nested absmax belong to whole matrices, so
    they have only the names of the batch axes.

    Args:
        q: `jaxbnb.QuantizedArray`, which may be abstract.
        names: name of each axis of the array, e.g. a mesh axis. If there are too few,
            the last axes have none.
        function: function to call for each part that ``q`` has.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((64, 32)), "nf4", axis=-2)
        >>> map_parts(q, ("embed", "mlp"), lambda part, names: names)
        QuantizedArray(nf4, codes=('mlp', 'embed'))
    """
    stored = [*names, *[None] * (q.ndim - len(names))]
    stored.append(stored.pop(q.axis))
    batch = tuple(stored[:-2])
    part_names = {
        "codes": tuple(stored),
        "absmax": tuple(stored),
        "nested_absmax": (*batch, None),
        "offset": batch,
        "zero_point": tuple(stored),
    }
    parts = {name: getattr(q, name) for name in PARTS}
    new = {
        name: None if part is None else function(part, part_names[name])
        for name, part in parts.items()
    }
    return dataclasses.replace(q, **new)


def array_axes(q: Any, stored: Sequence[Any]) -> tuple[Any, ...]:
    """Returns names for the array's axes, given those of its codes.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((64, 32)), "nf4", axis=-2)
        >>> array_axes(q, ("mlp", "embed"))
        ('embed', 'mlp')
    """
    *names, last = stored
    names.insert(len(names) + 1 + q.axis, last)
    return tuple(names)


def apply_or_eval_shape(function: Callable[[Any], Any], x: Any) -> Any:
    """Returns ``function(x)``, or only its shapes if ``x`` is abstract.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        >>> apply_or_eval_shape(jnp.transpose, x).shape
        (3, 2)
    """
    leaves = jax.tree.leaves(x)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(function, x)
    return function(x)


def shard_like(
    q: Any,
    x: Any,
    rename: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
) -> Any:
    """Shards an abstract ``q`` like the abstract array ``x``, if that has a sharding.

    Args:
        q: quantised ``x``.
        x: array, or its shape with or without a sharding.
        rename: function from the mesh axes of ``x``, by axis, to those of ``q``.
    """
    if not isinstance(x, jax.ShapeDtypeStruct):
        return q
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return q

    def place(part: Any, names: tuple[Any, ...]) -> Any:
        spec = make_even_spec(part.shape, names, sharding.mesh)
        return jax.ShapeDtypeStruct(
            part.shape, part.dtype, sharding=NamedSharding(sharding.mesh, spec)
        )

    return map_parts(q, rename(tuple(sharding.spec)), place)


def is_divided(x: Any) -> bool:
    """Whether an array is divided along axes of a mesh that are automatic.

    False for a traced array, for which JAX decides.

    Example:
        >>> import jax.numpy as jnp
        >>> is_divided(jnp.ones(3))
        False
    """
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    sharding = x.sharding
    return (
        isinstance(sharding, NamedSharding)
        and not sharding.is_fully_replicated
        and all(kind == AxisType.Auto for kind in sharding.mesh.axis_types)
    )


def make_even_spec(
    shape: Sequence[int], names: Sequence[Any], mesh: Any
) -> PartitionSpec:
    """Returns the spec of an array, without mesh axes that do not divide it evenly.

    A mesh may divide a weight but not its parts: along the axis of blocks there are
    fewer absmax than codes, and two 4-bit codes share a byte.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.AbstractMesh((4,), ("x",))
        >>> [make_even_spec(shape, ("x", None), mesh) for shape in ((8, 6), (6, 8))]
        [P('x', None), P(None, None)]
    """

    def size(name: Any) -> int:
        parts = name if isinstance(name, tuple) else () if name is None else (name,)
        return math.prod(mesh.shape.get(part, 1) for part in parts)

    kept = [
        name if n % size(name) == 0 else None
        for n, name in zip(shape, names, strict=True)
    ]
    return PartitionSpec(*kept)
