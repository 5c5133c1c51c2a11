"""QuantizedArray: an array stored as low-bit codes and one absmax per block."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from jaxbnb.core._memory import tree_nbytes
from jaxbnb.core._product import as_weight, product
from jaxbnb.core.parts import PARTS, apply_or_eval_shape, check_parts
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax", "nested_absmax", "offset", "zero_point"),
    meta_fields=("quant_type", "block_size", "axis", "axis_size", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray:
    """A quantised array: a pytree of plain arrays that knows how to decode itself.

    Each element stands for ``levels[code] * absmax``, where ``levels`` is the codebook
    of ``quant_type``. Along ``axis``, every ``block_size`` elements share an absmax.

    Invariants, for a logical shape with ``axis`` moved last, ``(*batch, rows, n)``:

    * ``codes`` is uint8 (int8 for ``int8`` and ``llm_int8``) of shape
      ``(*batch, rows, n)``. In 4-bit formats it is ``(*batch, rows, ceil(n / 2))``,
      with the first element in the high nibble.
    * ``absmax`` has shape ``(*batch, rows, ceil(n / block_size))``. It is float32, or
      uint8 codes when doubly quantised.
    * When doubly quantised, ``nested_absmax`` is float32
      ``(*batch, ceil(rows * blocks / 256))``, ``offset`` is float32 ``batch``, and an
      absmax is ``level * nested_absmax + offset``.
    * The formats of other libraries' checkpoints have scales in place of absmax, and
      levels beyond [-1, 1]. ``uint4`` and ``uint8`` have a ``zero_point`` per block,
      uint8 in the shape of ``absmax``: an element is ``(level - zero_point) * scale``.
      The scales of ``mxfp4`` are the bits of E8M0 floats. Those of ``nvfp4`` are the
      bits of E4M3 floats, divided by ``nested_absmax``, float32 ``(*batch, 1)``.

    Every child has the batch axes first, so ``jax.lax.scan``, ``vmap`` and ``q[i]``
    slice a stack of matrices as they slice a plain array.

    Attributes:
        codes: indices into the codebook.
        absmax: max(abs(x)) of each block, or its scale.
        nested_absmax: absmax of the absmax, when doubly quantised; else None.
        offset: mean of the absmax, when doubly quantised; else None.
        quant_type: format, as in `quantize`.
        block_size: number of elements that share an absmax; for ``llm_int8`` the length
            of the axis, rounded up to an even number.
        axis: axis that blocks run along, counted from the end (negative).
        axis_size: length of that axis.
        dtype: dtype of the array that was quantised, and the default of `dequantize`.
        zero_point: number of each block that levels are less by; None for zeros.

    Example:
        >>> import jax, jaxbnb
        >>> q = jaxbnb.quantize(jax.random.normal(jax.random.key(0), (256, 512)), "nf4")
        >>> q
        QuantizedArray(nf4, shape=(256, 512), dtype=float32, axis=-1, block_size=64,
                       double_quant=False, 72.0 KiB, 4.50 bits/param)
        >>> q.dequantize().shape
        (256, 512)
    """

    codes: Integer[Array, "*batch rows stored"]
    absmax: Float32[Array, "*batch rows blocks"] | Integer[Array, "*batch rows blocks"]
    nested_absmax: Float32[Array, "*batch nested"] | None
    offset: Float32[Array, "*batch"] | None
    quant_type: str
    block_size: int
    axis: int
    axis_size: int
    dtype: np.dtype
    zero_point: Integer[Array, "*batch rows blocks"] | None = None

    @property
    def double_quant(self) -> bool:
        """Whether the absmax is itself quantised, to levels of the dynamic map."""
        return self.offset is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the codes stand for."""
        shape = list(self.codes.shape[:-1])
        shape.insert(len(shape) + 1 + self.axis, self.axis_size)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def mT(self) -> "QuantizedArray":  # noqa: N802 (as of jax.Array)
        """The transposed matrix, or stack of matrices; nothing is copied.

        Raises:
            ValueError: the array has fewer than two axes, or its blocks do not run
                along one of the last two.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> q = jaxbnb.quantize(jnp.ones((256, 64)), "nf4")
            >>> q.mT.shape, q.mT.axis
            ((64, 256), -2)
        """
        if self.ndim < 2 or self.axis < -2:
            raise ValueError(
                "a transpose needs a matrix blocked along one of its last two axes; "
                f"got shape {self.shape} blocked along axis {self.axis}"
            )
        return dataclasses.replace(self, axis=-3 - self.axis)

    @property
    def T(self) -> "QuantizedArray":  # noqa: N802 (as of jax.Array)
        """The transposed matrix; nothing is copied.

        Raises:
            ValueError: the array is not a matrix; use `mT` for a stack.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> jaxbnb.quantize(jnp.ones((256, 64)), "nf4").T.shape
            (64, 256)
        """
        if self.ndim != 2:
            raise ValueError(
                f"T needs a matrix, got shape {self.shape}; use mT to transpose each "
                "matrix of a stack"
            )
        return self.mT

    @property
    def nbytes(self) -> int:
        """The bytes of codes and absmax, including the nested absmax."""
        return tree_nbytes(self)

    @property
    def bits_per_param(self) -> float:
        """Bits per element: 4.5 for nf4 in blocks of 64, or 4.127 doubly quantised."""
        return 8.0 * self.nbytes / self.size if self.size else 0.0

    def dequantize(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*shape"]:
        """Decodes the array in float32 and rounds it once to ``dtype``.

        An abstract array, made of ``jax.ShapeDtypeStruct``, gives an abstract result.

        Args:
            dtype: dtype of the result; None for the dtype that was quantised.

        Raises:
            TypeError: the parts were cast or averaged, so the codes are lost.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> q = jaxbnb.quantize(jnp.array([0.0, 0.5, -1.0]), "nf4")
            >>> q.dequantize().round(2)
            Array([ 0.  ,  0.44, -1.  ], dtype=float32)
        """
        check_parts(self)
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        return apply_or_eval_shape(lambda q: _dequantize(q, dtype), self)

    @property
    def astype(self) -> Any:
        """Raises AttributeError: casting codes would ruin them. It says what to do."""
        raise AttributeError(
            "a QuantizedArray has no astype: decode it with dequantize(dtype), or let "
            "it stand for another dtype with jaxbnb.core.cast_floating(q, dtype)"
        )

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Indexes the batch axes, which are all but the two axes of each matrix.

        ``q[...]`` is ``q``, and a loop over a stack yields its matrices.

        Raises:
            TypeError: the parts were cast or averaged.
            IndexError: the index reaches into the axes of a matrix, where elements
                share blocks; dequantize first.
        """
        index = index if isinstance(index, tuple) else (index,)
        if index and isinstance(index[-1], EllipsisType):
            index = index[:-1]
        if not index:
            return self
        batch = self.ndim - max(2, -self.axis)
        if len(index) > batch or any(i is None or i is Ellipsis for i in index):
            raise IndexError(
                f"a QuantizedArray of shape {self.shape} has {max(batch, 0)} batch "
                f"axes to index, got {len(index)} indices; dequantize to reach further"
            )
        check_parts(self)
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __iter__(self) -> Iterator["QuantizedArray"]:
        return (self[i] for i in range(self.shape[0]))

    # With this, NumPy's @ gives way to __rmatmul__.
    __array_ufunc__ = None

    def __rmatmul__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes ``x @ q`` as ``jaxbnb.matmul(x, q)``, for JAX and NumPy arrays.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> q = jaxbnb.quantize(jnp.ones((64, 2)), "int8", axis=-2)
            >>> jnp.ones((1, 64)) @ q, q.T @ jnp.ones(64)
            (Array([[64., 64.]], dtype=float32), Array([64., 64.], dtype=float32))
        """
        return product(jnp.asarray(x), self)

    def __matmul__(self, x: Float[Array, "*batch k m"]) -> Float[Array, "*batch n m"]:
        """Computes ``q @ x`` as ``(x.mT @ q.mT).mT``; a vector gives a vector."""
        if isinstance(x, QuantizedArray):
            raise TypeError("both factors are quantised; decode one with dequantize()")
        x = jnp.asarray(x)
        if x.ndim == 1:
            return product(x, self.mT)
        return product(x.mT, self.mT).mT

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Raises TypeError: NumPy cannot use it as an array. It says what to do."""
        raise TypeError(
            f"a QuantizedArray of shape {self.shape} was used as an array; decode it "
            "with dequantize(), multiply with x @ q or jaxbnb.matmul, or run the Linen "
            "model inside jaxbnb.linen.use_quantized()"
        )

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            # A tree_map has replaced the arrays by something else: specs, a mask.
            return f"QuantizedArray({self.quant_type}, codes={self.codes!r})"
        return (
            f"QuantizedArray({self.quant_type}, shape={self.shape}, "
            f"dtype={self.dtype}, axis={self.axis}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, "
            f"{_readable_bytes(self.nbytes)}, {self.bits_per_param:.2f} bits/param)"
        )

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Renders the array for notebooks: a summary, with the parts to unfold.

        Treescope calls it, also through ``flax.nnx.display``.
        """
        # Only a notebook pays for this import.
        from treescope import repr_lib

        fields = [field.name for field in dataclasses.fields(self)]
        children = PARTS
        static = [field for field in fields if field not in children]
        if hasattr(self.codes, "shape"):
            static = ["shape", "bits_per_param", "quant_type", "block_size", "axis"]
            static.append("dtype")
        names = [*static, *(n for n in children if getattr(self, n) is not None)]
        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={name: getattr(self, name) for name in names},
            path=path,
            subtree_renderer=subtree_renderer,
        )


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(q: QuantizedArray, dtype: np.dtype) -> Array:
    weight = as_weight(q).with_float_scales()
    x = dequantize_blockwise(
        weight.codes,
        weight.absmax,
        weight.codebook,
        block_size=weight.block_size,
        size=weight.size,
        nested=weight.nested,
        zero_point=weight.zero_point,
        dtype=dtype,
    )
    return jnp.moveaxis(x, -1, q.axis)


def _readable_bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
