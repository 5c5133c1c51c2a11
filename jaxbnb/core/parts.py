"""The parts of a QuantizedArray: checks that they are intact, and their axes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxbnb.core import formats

PARTS: Final = ("codes", "absmax", "nested_absmax", "offset")


def check_parts(q: Any) -> None:
    """Raises TypeError if something has computed with the parts of ``q``.

    Codes are indices: casting or averaging every leaf of a tree leaves numbers that
    only look like codes. JAX puts placeholders into a pytree, so nothing can be checked
    when one is made. Every use calls this function instead.

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
    wanted = {
        "codes": np.dtype(np.int8 if is_linear else np.uint8),
        "absmax": np.dtype(np.float32 if q.nested_absmax is None else np.uint8),
        "nested_absmax": np.dtype(np.float32),
        "offset": np.dtype(np.float32),
    }
    for name, dtype in wanted.items():
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


def with_axes(
    q: Any, names: Sequence[Any], function: Callable[[Any, tuple[Any, ...]], Any]
) -> Any:
    """``q`` with each part replaced by ``function(part, names)``.

    Codes and absmax have the array's axes in the order in which they are stored, with
    the axis that blocks run along last. The absmax of absmax belong to whole matrices,
    so they have only the names of the batch axes.

    Args:
        q: a `jaxbnb.QuantizedArray`, even an abstract one.
        names: a name for each axis of the array, e.g. the axes of a mesh; if there are
            fewer, for its first axes.
        function: called for each part that ``q`` has.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((64, 32)), "nf4", axis=-2)
        >>> with_axes(q, ("embed", "mlp"), lambda part, names: names)
        QuantizedArray(nf4, codes=('mlp', 'embed'))
    """
    held = [*names, *[None] * (q.ndim - len(names))]
    held.append(held.pop(q.axis))
    batch = tuple(held[:-2])
    of = {
        "codes": tuple(held),
        "absmax": tuple(held),
        "nested_absmax": (*batch, None),
        "offset": batch,
    }
    parts = {name: getattr(q, name) for name in PARTS}
    new = {k: None if v is None else function(v, of[k]) for k, v in parts.items()}
    return dataclasses.replace(q, **new)


def axes_of_array(q: Any, held: Sequence[Any]) -> tuple[Any, ...]:
    """The names of the array's axes, given those of its codes. Inverts `with_axes`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((64, 32)), "nf4", axis=-2)
        >>> axes_of_array(q, ("mlp", "embed"))
        ('embed', 'mlp')
    """
    *names, last = held
    names.insert(len(names) + 1 + q.axis, last)
    return tuple(names)


def on_shapes(function: Callable[[Any], Any], x: Any) -> Any:
    """``function(x)``, or its shapes if ``x`` is abstract.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> on_shapes(jnp.transpose, jax.ShapeDtypeStruct((2, 3), jnp.float32)).shape
        (3, 2)
    """
    leaves = jax.tree.leaves(x)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(function, x)
    return function(x)


def placed_like(
    q: Any,
    x: Any,
    rename: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
) -> Any:
    """An abstract ``q`` divided as the abstract array ``x`` is, if that has a sharding.

    Args:
        q: ``x``, quantised.
        x: an array, or its shape with or without a sharding.
        rename: turns the axes that ``x`` is divided along into those of ``q``.
    """
    if not isinstance(x, jax.ShapeDtypeStruct):
        return q
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return q

    def place(part: Any, names: tuple[Any, ...]) -> Any:
        spec = divided(part.shape, names, sharding.mesh)
        return jax.ShapeDtypeStruct(
            part.shape, part.dtype, sharding=NamedSharding(sharding.mesh, spec)
        )

    return with_axes(q, rename(tuple(sharding.spec)), place)


def divided(shape: Sequence[int], names: Sequence[Any], mesh: Any) -> PartitionSpec:
    """The spec of an array, leaving out mesh axes that do not divide it evenly.

    A mesh may divide a weight and not its parts: there are fewer absmax than codes
    along the axis of blocks, and codes of 4 bits take half as many bytes.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.AbstractMesh((4,), ("x",))
        >>> divided((8, 6), ("x", None), mesh), divided((6, 8), ("x", None), mesh)
        (P('x', None), P(None, None))
    """

    def size(name: Any) -> int:
        parts = name if isinstance(name, tuple) else () if name is None else (name,)
        return math.prod(mesh.shape.get(part, 1) for part in parts)

    kept = [
        name if n % size(name) == 0 else None
        for n, name in zip(shape, names, strict=True)
    ]
    return PartitionSpec(*kept)
