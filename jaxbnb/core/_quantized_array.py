"""QuantizedArray: an array stored as low-bit codes and one absmax a block."""

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

from jaxbnb.core import formats
from jaxbnb.core._memory import tree_nbytes
from jaxbnb.core._product import product
from jaxbnb.core.parts import check_parts, on_shapes, placed_like
from jaxbnb_kernels.matmul_int8 import quantize_rows
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax", "nested_absmax", "offset"),
    meta_fields=("quant_type", "block_size", "axis", "axis_size", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray:
    """A quantised array: a pytree of plain arrays that knows how to decode itself.

    With ``levels`` the codebook of ``quant_type``, the array it stands for is, along
    ``axis``, ``levels[code] * absmax``, an absmax for each ``block_size`` elements.

    Invariants, for a logical shape with ``axis`` moved last, ``(*batch, rows, n)``:

    * ``codes`` is uint8 (int8 for ``int8`` and ``llm_int8``) of shape
      ``(*batch, rows, n)``, or of ``(*batch, rows, ceil(n / 2))`` for 4-bit formats,
      first element in the high nibble;
    * ``absmax`` has shape ``(*batch, rows, ceil(n / block_size))``: float32, or uint8
      codes when doubly quantised;
    * then ``nested_absmax`` is float32 ``(*batch, ceil(rows * blocks / 256))``,
      ``offset`` is float32 ``batch`` and absmax is ``level * nested_absmax + offset``.

    Every child carries the batch axes first, so ``jax.lax.scan``, ``vmap`` and ``q[i]``
    take slices of a stack of matrices as they do of a plain array.

    Attributes:
        codes: the indices into the codebook.
        absmax: max(abs(x)) of each block.
        nested_absmax: of the absmax, when doubly quantised; else None.
        offset: mean of the absmax, when doubly quantised; else None.
        quant_type: the format, as `quantize` takes it.
        block_size: elements that share an absmax; for ``llm_int8`` as many as the axis
            has, or one more to be even.
        axis: the axis along which blocks run, counted from the end (negative).
        axis_size: the length of that axis.
        dtype: the dtype of the array that was quantised, and of `dequantize`'s default.

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

    @property
    def double_quant(self) -> bool:
        """Whether the absmax is itself quantised."""
        return self.nested_absmax is not None

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
        """The matrix, or each of a stack, transposed: the same arrays read otherwise.

        Raises:
            ValueError: the array has fewer than two axes, or its blocks run along
                another than the last two.

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
        """The matrix transposed: the same arrays, read in another order.

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
        """The bytes of codes, absmax and, when doubly quantised, its own absmax."""
        return tree_nbytes(self)

    @property
    def bits_per_param(self) -> float:
        """Bits held an element; 4.5 for nf4 in blocks of 64, 4.127 doubly quantised."""
        return 8.0 * self.nbytes / self.size if self.size else 0.0

    def dequantize(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*shape"]:
        """The array itself, decoded in float32 and rounded once to ``dtype``.

        An abstract array, of ``jax.ShapeDtypeStruct``, gives its shape and dtype.

        Args:
            dtype: of the result; None for the dtype that was quantised.

        Raises:
            TypeError: the array was cast or averaged, so its codes are lost.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> q = jaxbnb.quantize(jnp.array([0.0, 0.5, -1.0]), "nf4")
            >>> q.dequantize().round(2)
            Array([ 0.  ,  0.44, -1.  ], dtype=float32)
        """
        check_parts(self)
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        return on_shapes(lambda q: _dequantize(q, dtype), self)

    @property
    def astype(self) -> Any:
        """Raises AttributeError, and says how to cast what the codes stand for."""
        raise AttributeError(
            "a QuantizedArray has no astype: decode it with dequantize(dtype), or let "
            "it stand for another dtype with jaxbnb.core.cast_floating(q, dtype)"
        )

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Slices of the batch axes: all but the two of each matrix.

        ``q[...]`` is ``q``, and a loop over a stack yields its matrices.

        Raises:
            TypeError: the array was cast or averaged.
            IndexError: the index reaches into the axes of a matrix, whose rows share
                blocks; dequantize first.
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

    # Makes NumPy, and then Python, ask __rmatmul__.
    __array_ufunc__ = None

    def __rmatmul__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """``x @ q`` is ``jaxbnb.matmul(x, q)``, for JAX and NumPy arrays.

        Example:
            >>> import jax.numpy as jnp, jaxbnb
            >>> q = jaxbnb.quantize(jnp.ones((64, 2)), "int8", axis=-2)
            >>> jnp.ones((1, 64)) @ q, q.T @ jnp.ones(64)
            (Array([[64., 64.]], dtype=float32), Array([64., 64.], dtype=float32))
        """
        return product(jnp.asarray(x), self)

    def __matmul__(self, x: Float[Array, "*batch k m"]) -> Float[Array, "*batch n m"]:
        """``q @ x``, computed as ``(x.mT @ q.mT).mT``; a vector gives a vector."""
        if isinstance(x, QuantizedArray):
            raise TypeError("both factors are quantised; decode one with dequantize()")
        x = jnp.asarray(x)
        if x.ndim == 1:
            return product(x, self.mT)
        return product(x.mT, self.mT).mT

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Raises TypeError, for whoever takes it for an array, and says what to do."""
        raise TypeError(
            f"a QuantizedArray of shape {self.shape} was used as an array; decode it "
            "with dequantize(), multiply with x @ q or jaxbnb.matmul, or run the Linen "
            "model inside jaxbnb.linen.use_quantized()"
        )

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            # A tree_map has put something else (a spec, a mask) where the arrays were.
            return f"QuantizedArray({self.quant_type}, codes={self.codes!r})"
        return (
            f"QuantizedArray({self.quant_type}, shape={self.shape}, "
            f"dtype={self.dtype}, axis={self.axis}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, "
            f"{_readable_bytes(self.nbytes)}, {self.bits_per_param:.2f} bits/param)"
        )

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """What notebooks show: the array that it stands for, and its parts to unfold.

        Treescope calls it, as ``flax.nnx.display`` does.
        """
        from treescope import repr_lib

        fields = [field.name for field in dataclasses.fields(self)]
        children, static = fields[:4], fields[4:]
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


def quantize(
    x: Float[Array, "*shape"],
    quant_type: str,
    *,
    block_size: int | None = None,
    axis: int = -1,
    double_quant: bool = False,
) -> QuantizedArray:
    """Quantises ``x`` in blocks along ``axis``; see `QuantizedArray` for the layout.

    Leading axes are batch axes: a stack of matrices is quantised matrix by matrix. The
    last block of an axis may be short. Quantise the kernel of a dense layer,
    ``(in, out)``, along ``axis=-2``, over which products sum: its bytes are then those
    that bitsandbytes makes of the torch weight whenever ``in % block_size == 0``.

    Non-finite elements make their block's absmax, and so the block, non-finite; with
    ``double_quant`` the whole matrix. They never become finite.

    Args:
        x: float32, bfloat16, float16 or float64; computed in float32. A
            ``jax.ShapeDtypeStruct`` gives an abstract result.
        quant_type: of 4 bits, "nf4", "fp4" or "int4" (linear); of 8 bits, "int8"
            (linear), "fp8_e4m3", "fp8_e5m2", "dynamic8" or, for non-negative values,
            "dynamic8_unsigned"; or "llm_int8": linear with one absmax for the whole
            axis, in bitsandbytes' rounding, which `jaxbnb.matmul` multiplies as
            integers.
        block_size: elements that share an absmax; even. None for 64. ``llm_int8`` takes
            none.
        axis: along which blocks run.
        double_quant: quantise the absmax too, to 8 bits in blocks of 256; not for
            ``llm_int8``.

    Raises:
        TypeError: ``x`` is not a floating-point array.
        ValueError: unknown ``quant_type``, bad ``block_size`` or ``double_quant``,
            ``axis`` out of range.

    Example:
        >>> import jax, jaxbnb
        >>> x = jax.random.normal(jax.random.key(0), (8, 1024, 512))
        >>> q = jaxbnb.quantize(x, "nf4", axis=-2, double_quant=True)
        >>> q.shape, q[0].shape, round(q.bits_per_param, 3), q.nbytes
        ((8, 1024, 512), (1024, 512), 4.127, 2163744)

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023 (nf4).
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021 (dynamic8).
        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale, 2022 (llm_int8).
        Micikevicius et al., FP8 Formats for Deep Learning, 2022 (fp8).
    """
    formats.codebook(quant_type)
    block_size = formats.choose_block_size(quant_type, block_size)
    formats.check_double_quant(quant_type, double_quant)
    if isinstance(x, QuantizedArray):
        raise TypeError(f"x is quantised already, {x}; decode it with dequantize()")
    is_torch = type(x).__module__.partition(".")[0] == "torch"
    if is_torch or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = getattr(x, "dtype", type(x).__name__)
        todo = "cast it first, e.g. with jnp.asarray(x, jnp.float32)"
        if hasattr(x, "unbox"):
            todo = "take it out of its box first, with flax.linen.unbox"
        elif is_torch:
            todo = "make it a NumPy array first, with x.detach().float().cpu().numpy()"
        raise TypeError(
            f"quantize needs an array of a floating dtype, got {got}; {todo}"
        )
    if x.ndim == 0:
        raise ValueError("quantize needs at least one axis to block; got a scalar")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of shape {x.shape}")
    axis = axis - x.ndim if axis >= 0 else axis
    quantized = on_shapes(
        lambda x: _quantize(x, quant_type, block_size, axis, double_quant), x
    )
    return placed_like(quantized, x)


def dequantize(
    q: QuantizedArray, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*shape"]:
    """The array that ``q`` stands for; the same as ``q.dequantize(dtype)``.

    Args:
        q: as `quantize` returns it.
        dtype: of the result; None for the dtype that was quantised.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> jaxbnb.dequantize(jaxbnb.quantize(jnp.ones(4), "int8"), jnp.bfloat16)
        Array([1, 1, 1, 1], dtype=bfloat16)
    """
    return q.dequantize(dtype)


# Compiled even when called eagerly: op by op, XLA would hold a temporary for each of
# the encoder's steps, and take twenty times as long.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    x: Array, quant_type: str, block_size: int | None, axis: int, double_quant: bool
) -> QuantizedArray:
    rows = jnp.moveaxis(x, axis, -1)
    if block_size is None:
        size = x.shape[axis]
        block_size = formats.whole_axis(size)
        codes, scale = quantize_rows(rows)
        # An empty row has no block.
        absmax = scale[..., None][..., :size]
    else:
        codes, absmax = quantize_blockwise(
            rows, formats.codebook(quant_type), block_size=block_size
        )
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = quantize_absmax(absmax)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        quant_type=quant_type,
        block_size=block_size,
        axis=axis,
        axis_size=x.shape[axis],
        dtype=np.dtype(x.dtype),
    )


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(q: QuantizedArray, dtype: np.dtype) -> Array:
    nested = None
    if q.nested_absmax is not None and q.offset is not None:
        nested = q.nested_absmax, q.offset
    x = dequantize_blockwise(
        q.codes,
        q.absmax,
        formats.codebook(q.quant_type),
        block_size=q.block_size,
        size=q.axis_size,
        nested=nested,
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
