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
from jaxbnb.core.parts import apply_or_eval_shape, make_even_spec, map_parts

_ARRAYS: Final = (jax.Array, np.ndarray)
# Metadata of the variable itself, or of an array that it no longer holds.
_STORAGE_METADATA: Final = ("hijax", "ref", "eager_sharding", "axes")


class QuantParam(nnx.Variable[QuantizedArray]):
    """A frozen quantised weight.

    Not an ``nnx.Param``: ``nnx.grad`` and ``nnx.Optimizer(wrt=nnx.Param)`` skip it.
    Even if a kernel is stored as matrices, ``shape`` is the shape of the kernel,
    because models read the sizes of their heads from it.

    An ``out_sharding``, as from ``nnx.with_partitioning``, names the weight's axes.
    ``nnx.get_partition_spec`` turns it into a spec for each part. Codes and absmax are
    divided like the weight, except along mesh axes that do not divide them evenly.
    """

    def __init__(
        self, value: Any, *, eager_sharding: bool | None = None, **metadata: Any
    ):
        # Not by Flax, which would divide all parts in the same way.
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

        A value may say how the weight is divided: a ``PartitionSpec`` of its axes, or a
        ``jax.ShapeDtypeStruct`` with a sharding. Then it is applied to each part.
        """
        return super().replace(self._split_by_part(value), **updates)

    def set_value(self, value: Any, **options: Any) -> None:
        """Sets the value, like ``nnx.Variable``, or applies a spec like `replace`."""
        super().set_value(self._split_by_part(value), **options)

    def _split_by_part(self, value: Any) -> Any:
        """Applies a spec or sharding to each part; returns any other value."""
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
        """Returns the mesh in the metadata, else the one in use; None without any."""
        mesh = self.get_metadata().get("mesh") or jax.sharding.get_abstract_mesh()
        return None if mesh.empty else mesh

    def _by_part(
        self, spec: Any, function: Callable[[Any, PartitionSpec], Any], mesh: Any
    ) -> QuantizedArray:
        """Replaces each part by ``function(part, spec)``, given the weight's spec."""
        q, axes = self.get_raw_value(), self.get_metadata().get("axes")
        names = tuple(spec)
        if axes is not None:
            names = axes.matrix_names(names, len(self.shape) - len(axes.shape))

        def apply_to_part(part: Any, names: tuple[Any, ...]) -> Any:
            spec = PartitionSpec(*names)
            if mesh is not None and hasattr(part, "shape"):
                spec = make_even_spec(part.shape, names, mesh)
            return function(part, spec)

        return map_parts(q, names, apply_to_part)

    def _constrained(self) -> Any:
        """Returns the value, divided over the mesh according to its metadata."""
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
        """Decodes the weight, to the dtype that was quantised."""
        value: Any = super().get_value(**options)
        # Printing a model, or a transformation, may put other values there.
        if isinstance(value, QuantizedArray) and isinstance(value.codes, _ARRAYS):
            return value.dequantize()
        return value


def quantize_kernel(
    param: nnx.Variable[Any],
    config: QuantConfig,
    axes: KernelAxes | None = None,
    kind: type[QuantParam] = QuantParam,
) -> QuantParam:
    """Quantises a kernel, and keeps its metadata.

    Args:
        param: variable that holds the kernel, or its shape.
        config: format of the kernel.
        axes: axes of a kernel that is stored as matrices; None to leave its shape.
        kind: type of the new variable.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> param = nnx.Param(jnp.ones((64, 2)), role="head")
        >>> quantize_kernel(param, jaxbnb.QuantConfig()).role
        'head'
    """

    def quantize(kernel: Any) -> QuantizedArray:
        kernel = kernel if axes is None else axes.to_matrices(kernel)
        return config.quantize_kernel(kernel)

    metadata = (
        _kept_metadata(param)
        if axes is None
        else {**_kept_metadata(param), "axes": axes}
    )
    value: Any = param.get_value()
    new = kind(apply_or_eval_shape(quantize, value), **metadata)
    return new.replace(value) if _is_placed(value) else new


def quantize_embedding(param: nnx.Variable[Any], config: QuantConfig) -> QuantParam:
    """Quantises an embedding, like `quantize_kernel`."""
    value: Any = param.get_value()
    return QuantParam(config.quantize_embedding(value), **_kept_metadata(param))


def decode_param(
    param: QuantParam, dtype: jax.typing.DTypeLike | None = None
) -> nnx.Param[Any]:
    """Decodes a weight to the parameter that it was, with its metadata."""
    axes = param.get_metadata().get("axes")

    def decode(q: QuantizedArray) -> Array:
        x = q.dequantize(dtype)
        return x if axes is None else axes.to_kernel(x)

    value = apply_or_eval_shape(decode, param.get_raw_value())
    storage = {k: v for k, v in param.get_metadata().items() if k in ("hijax", "ref")}
    # Not through __init__, which would look for the mesh of an out_sharding.
    metadata = {
        **storage,
        **_kept_metadata(param),
        "eager_sharding": nnx.using_eager_sharding(),
    }
    new: Any = nnx.Param.from_metadata(value, metadata)
    return new


def _is_placed(value: Any) -> bool:
    """Returns whether a value is the shape of an array, with a sharding."""
    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    return is_shape and isinstance(value.sharding, NamedSharding)


def _kept_metadata(param: nnx.Variable[Any]) -> dict[str, Any]:
    """Returns the metadata that a variable keeps when its weight changes form."""
    return {
        name: value
        for name, value in param.get_metadata().items()
        if name not in _STORAGE_METADATA and not name.startswith("on_")
    }


def shard_result(
    function: Callable[..., Array], out_sharding: jax.sharding.PartitionSpec | Any
) -> Callable[..., Array]:
    """Returns the function with its result sharded on a mesh with explicit axes.

    Inside the function, axes are automatic, because JAX cannot infer the sharding of
    some steps of decoding. All arrays must be arguments, not captured.

    Args:
        function: function of arrays and pytrees of them.
        out_sharding: sharding of the result; None to return the function itself.

    Example:
        >>> shard_result(abs, None) is abs
        True
    """
    if out_sharding is None:
        return function
    auto: Any = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return auto
