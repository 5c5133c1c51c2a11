"""NNX variables that hold a quantised weight."""

from collections.abc import Callable
from typing import Any, Final

import jax
import numpy as np
from flax import nnx
from flax.core import spmd
from flax.typing import MISSING
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.contraction import KernelAxes
from jaxbnb.core.parts import divided, on_shapes, with_axes

_ARRAYS: Final = (jax.Array, np.ndarray)
# Belongs to the variable itself, or describes an array that it no longer holds.
_OWN_METADATA: Final = ("hijax", "ref", "eager_sharding", "axes")


class QuantParam(nnx.Variable[QuantizedArray]):
    """A frozen quantised weight.

    Not an ``nnx.Param``: ``nnx.grad`` and ``nnx.Optimizer(wrt=nnx.Param)`` skip it.
    Even if a kernel is held as matrices, ``shape`` is the kernel's, because models read
    the sizes of their heads from it.

    An ``out_sharding``, as from ``nnx.with_partitioning``, names the weight's axes.
    ``nnx.get_partition_spec`` turns it into a spec for each part: codes and absmax are
    divided like the weight, where a known mesh divides them evenly.
    """

    def __init__(
        self, value: Any, *, eager_sharding: bool | None = None, **metadata: Any
    ):
        # Flax would divide all parts in the same way.
        super().__init__(value, eager_sharding=False, **metadata)
        if nnx.using_eager_sharding() if eager_sharding is None else eager_sharding:
            self.set_raw_value(self._constrained())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before it was quantised."""
        held = self.get_raw_value().shape
        axes = self.get_metadata().get("axes")
        if axes is None:
            return held
        return *held[: len(held) - len(axes.matrix_shape)], *axes.shape

    def replace(self, value: Any = MISSING, **updates: Any) -> Any:
        """Returns the variable with another value, like ``nnx.Variable``'s method.

        A value that says how a weight is divided, a ``PartitionSpec`` of its axes or a
        ``jax.ShapeDtypeStruct`` with a sharding, is applied to each part.
        """
        return super().replace(self._of_parts(value), **updates)

    def set_value(self, value: Any, **options: Any) -> None:
        """Sets the value, as in ``nnx.Variable``, but by part where `replace` does."""
        super().set_value(self._of_parts(value), **options)

    def _of_parts(self, value: Any) -> Any:
        """Applies to each part what Flax says about the whole weight."""
        if not isinstance(self.get_raw_value(), QuantizedArray):
            return value
        if isinstance(value, PartitionSpec):
            return self._by_part(value, lambda _, spec: spec, self._mesh())
        if not _is_placed(value):
            return value
        mesh = value.sharding.mesh

        def place(part: Any, spec: PartitionSpec) -> Any:
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)

        return self._by_part(value.sharding.spec, place, mesh)

    def _mesh(self) -> Any:
        """The mesh in its metadata, else the one in use; None if there is neither."""
        mesh = self.get_metadata().get("mesh") or jax.sharding.get_abstract_mesh()
        return None if mesh.empty else mesh

    def _by_part(
        self, spec: Any, function: Callable[[Any, PartitionSpec], Any], mesh: Any
    ) -> QuantizedArray:
        """``function(part, spec)`` for each part, given the spec of the weight."""
        q, axes = self.get_raw_value(), self.get_metadata().get("axes")
        names = tuple(spec)
        if axes is not None:
            names = axes.matrix_names(names, len(self.shape) - len(axes.shape))

        def of_part(part: Any, names: tuple[Any, ...]) -> Any:
            spec = PartitionSpec(*names)
            if mesh is not None and hasattr(part, "shape"):
                spec = divided(part.shape, names, mesh)
            return function(part, spec)

        return with_axes(q, names, of_part)

    def _constrained(self) -> Any:
        """The value, divided over the mesh according to its metadata."""
        value, mesh = self.get_raw_value(), self._mesh()
        spec = self.get_metadata().get("out_sharding")
        if not spec or mesh is None or not isinstance(value, QuantizedArray):
            return value
        if not isinstance(value.codes, jax.Array):
            return value
        rules = self.get_metadata().get("sharding_rules")
        spec = spmd.get_pspec(tuple(spec), rules)
        return self._by_part(
            spec, lambda part, s: spmd.shard_value(part, s, None, mesh), mesh
        )


class DecodedParam(QuantParam):
    """A frozen quantised weight that decodes itself when it is read.

    It stays codes when it is split, merged, scanned over or saved.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> param = DecodedParam(jaxbnb.quantize(jnp.ones((3, 64, 32)), "int8"))
        >>> jnp.einsum("ecd,edf->ecf", jnp.ones((3, 5, 64)), param).shape
        (3, 5, 32)
        >>> param.get_raw_value().quant_type
        'int8'
    """

    def get_value(self, **options: Any) -> Any:
        """The weight decoded, in the dtype that was quantised."""
        value: Any = super().get_value(**options)
        # Printing a model, or a transformation, may have put something else there.
        if isinstance(value, QuantizedArray) and isinstance(value.codes, _ARRAYS):
            return value.dequantize()
        return value


def quant_kernel(
    param: nnx.Variable[Any],
    config: QuantConfig,
    axes: KernelAxes | None = None,
    kind: type[QuantParam] = QuantParam,
) -> QuantParam:
    """Quantises a kernel, and keeps its metadata.

    Args:
        param: variable that holds the kernel, or its shape.
        config: its format.
        axes: axes of a kernel that is to be held as matrices; None for one as it is.
        kind: type of the new variable.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> param = nnx.Param(jnp.ones((64, 2)), role="head")
        >>> quant_kernel(param, jaxbnb.QuantConfig()).role
        'head'
    """

    def quantize(kernel: Any) -> QuantizedArray:
        kernel = kernel if axes is None else axes.to_matrices(kernel)
        return config.quantize_kernel(kernel)

    metadata = _kept(param) if axes is None else {**_kept(param), "axes": axes}
    value: Any = param.get_value()
    new = kind(on_shapes(quantize, value), **metadata)
    return new.replace(value) if _is_placed(value) else new


def quant_embedding(param: nnx.Variable[Any], config: QuantConfig) -> QuantParam:
    """Quantises an embedding, like `quant_kernel`."""
    value: Any = param.get_value()
    return QuantParam(config.quantize_embedding(value), **_kept(param))


def decoded(
    param: QuantParam, dtype: jax.typing.DTypeLike | None = None
) -> nnx.Param[Any]:
    """The weight decoded into the parameter that it was, with its metadata."""
    axes = param.get_metadata().get("axes")

    def decode(q: QuantizedArray) -> Array:
        x = q.dequantize(dtype)
        return x if axes is None else axes.to_kernel(x)

    value = on_shapes(decode, param.get_raw_value())
    own = {k: v for k, v in param.get_metadata().items() if k in ("hijax", "ref")}
    # Not through its __init__, which would ask for the mesh of an out_sharding.
    metadata = {**own, **_kept(param), "eager_sharding": nnx.using_eager_sharding()}
    new: Any = nnx.Param.from_metadata(value, metadata)
    return new


def _is_placed(value: Any) -> bool:
    """Whether a value is an array's shape with a sharding."""
    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    return is_shape and isinstance(value.sharding, NamedSharding)


def _kept(param: nnx.Variable[Any]) -> dict[str, Any]:
    """The metadata that a variable keeps when its weight changes form."""
    return {
        name: value
        for name, value in param.get_metadata().items()
        if name not in _OWN_METADATA and not name.startswith("on_")
    }


def sharded(
    function: Callable[..., Array], out_sharding: jax.sharding.PartitionSpec | Any
) -> Callable[..., Array]:
    """Returns the function with its result sharded on a mesh of explicit axes.

    Inside it axes are automatic, as decoding has steps whose sharding JAX cannot tell
    from their operands. All arrays must be arguments.

    Args:
        function: function of arrays and pytrees of them.
        out_sharding: sharding of the result; None for the function as it is.

    Example:
        >>> sharded(abs, None) is abs
        True
    """
    if out_sharding is None:
        return function
    auto: Any = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return auto
