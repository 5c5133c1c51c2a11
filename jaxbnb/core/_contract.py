"""Kernels with any number of axes, held and multiplied as matrices."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbnb.core._matmul import matmul
from jaxbnb.core._quantized_array import QuantizedArray


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """Which axes of a kernel are summed over, which are outputs, and which go along.

    A quantised kernel is held as ``(*stack, *batch, fan_in, fan_out)``: the axes that
    are summed over flattened to one, along which blocks run, and those of the outputs
    to another. Of a model's layers, ``stack`` is what ``vmap`` or ``scan`` put before.

    Attributes:
        shape: of the kernel, without ``stack``.
        batch: the axes that the input and the result have too, e.g. of experts.
        contract: the axes that the product sums over.
        out: the others.

    Example:
        >>> import jax.numpy as jnp
        >>> heads = KernelAxes((4, 8, 64), batch=(), contract=(0, 1), out=(2,))
        >>> heads.to_matrices(jnp.ones((12, 4, 8, 64))).shape
        (12, 32, 64)
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contract: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Every axis, as the matrices have them."""
        return (*self.batch, *self.contract, *self.out)

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of these axes of the kernel."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(*batch, fan_in, fan_out)``."""
        fans = (math.prod(self.sizes(axes)) for axes in (self.contract, self.out))
        return *self.sizes(self.batch), *fans

    def to_matrices(self, kernel: Float[Array, "*kernel"]) -> Float[Array, "*matrices"]:
        """The kernel ``(*stack, *shape)`` as matrices.

        Raises:
            ValueError: it does not end in ``shape``.
        """
        num_stack = kernel.ndim - len(self.shape)
        stack = kernel.shape[: max(num_stack, 0)]
        if num_stack < 0 or kernel.shape[num_stack:] != self.shape:
            raise ValueError(
                f"a kernel of shape {self.shape}, or a stack of them along leading "
                f"axes, was expected; got {kernel.shape}"
            )
        order = [num_stack + axis for axis in self.order]
        kernel = jnp.transpose(kernel, [*range(num_stack), *order])
        return kernel.reshape(*stack, *self.matrix_shape)

    def to_kernel(self, matrices: Float[Array, "*matrices"]) -> Float[Array, "*kernel"]:
        """The inverse of `to_matrices`."""
        stack = matrices.shape[: matrices.ndim - len(self.matrix_shape)]
        x = matrices.reshape(*stack, *self.sizes(self.order))
        inverse = [len(stack) + self.order.index(i) for i in range(len(self.shape))]
        return jnp.transpose(x, [*range(len(stack)), *inverse])

    def add_bias(
        self, y: Float[Array, "*batch_rest_out"], bias: Float[Array, "*batch_out"]
    ) -> Float[Array, "*batch_rest_out"]:
        """Adds a bias of the batch and output axes to what `contract` gives."""
        num_batch = len(self.batch)
        rest = [1] * (y.ndim - bias.ndim)
        batch, out = bias.shape[:num_batch], bias.shape[num_batch:]
        return y + bias.reshape(*batch, *rest, *out)


def general_axes(
    shape: Sequence[int],
    features: int | Sequence[int],
    axis: int | Sequence[int],
    batch_dims: Sequence[int] = (),
) -> tuple[list[int], list[int], KernelAxes]:
    """What ``nn.DenseGeneral`` of Flax sums over, and the axes of its kernel.

    Args:
        shape: of the input.
        features: sizes of the last axes of the result.
        axis: which axes of the input are summed over.
        batch_dims: leading axes of the input that have kernels of their own.

    Returns:
        ``batch`` and ``contract`` as `contract` takes them, and the kernel's axes.

    Example:
        >>> batch, contract, axes = general_axes((2, 5, 4, 32), 64, (-2, -1))
        >>> batch, contract, axes.shape, axes.matrix_shape
        ([], [2, 3], (4, 32, 64), (128, 64))
    """
    features, axis = (
        (x,) if isinstance(x, int) else tuple(x) for x in (features, axis)
    )
    # Flax sorts them, whatever their order.
    batch, contract = (
        sorted(i % len(shape) for i in axes) for axes in (batch_dims, axis)
    )
    if batch != list(range(len(batch))):
        raise ValueError(f"batch_dims must be the leading axes, got {batch_dims}")
    sizes = [shape[i] for i in (*batch, *contract)]
    return batch, contract, kernel_axes(len(batch), len(axis), (*sizes, *features))


def kernel_axes(
    num_batch: int, num_contract: int, shape: tuple[int, ...]
) -> KernelAxes:
    """The axes of a kernel that has them in order, batch axes first.

    Example:
        >>> kernel_axes(1, 2, (8, 4, 32, 64))
        KernelAxes(shape=(8, 4, 32, 64), batch=(0,), contract=(1, 2), out=(3,))
    """
    batch, contract, out = np.split(
        np.arange(len(shape)), [num_batch, num_batch + num_contract]
    )
    return KernelAxes(shape, *(tuple(axes.tolist()) for axes in (batch, contract, out)))


def contract(
    x: Float[Array, "*inputs"],
    q: QuantizedArray,
    axes: KernelAxes,
    *,
    contract: Sequence[int],
    batch: Sequence[int] = (),
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
) -> Float[Array, "*batch_rest_out"]:
    """``jax.lax.dot_general`` of ``x`` with a kernel that is held as matrices.

    Args:
        x: any number of axes.
        q: `KernelAxes.to_matrices` of the kernel, quantised along axis -2.
        axes: of the kernel.
        contract: the axes of ``x`` that are summed over, in the order of the kernel's.
        batch: the axes of ``x`` that go along with the kernel's batch axes.
        compute_dtype: as of `jaxbnb.matmul`.
        outlier_threshold: as of `jaxbnb.matmul`.
        act_quant_type: as of `jaxbnb.matmul`.

    Returns:
        The batch axes, then the others of ``x``, then the outputs of the kernel, in the
        dtype of ``x``.

    Raises:
        ValueError: ``q`` or ``x`` is not of the shape that ``axes`` say.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> axes = KernelAxes((4, 8, 64), batch=(), contract=(0, 1), out=(2,))
        >>> matrix = axes.to_matrices(jnp.ones((4, 8, 64)))
        >>> q = jaxbnb.quantize(matrix, "int8", axis=-2)
        >>> contract(jnp.ones((2, 5, 4, 8)), q, axes, contract=(2, 3)).shape
        (2, 5, 64)
    """
    if q.shape != axes.matrix_shape:
        raise ValueError(
            f"a kernel of shape {axes.shape} is held as {axes.matrix_shape}, got a "
            f"QuantizedArray of {q.shape}; a stack of layers has its axis first, and "
            "is sliced before a layer is called"
        )
    got = tuple(x.shape[axis] for axis in (*batch, *contract))
    expected = axes.sizes((*axes.batch, *axes.contract))
    if got != expected:
        raise ValueError(
            f"shapes do not multiply: axes {(*batch, *contract)} of an input of shape "
            f"{x.shape} must be {expected} for a kernel of shape {axes.shape}"
        )
    rest = [i for i in range(x.ndim) if i not in (*batch, *contract)]
    lead = tuple(x.shape[i] for i in (*batch, *rest))
    y = matmul(
        to_rows(x, contract, batch),
        q,
        compute_dtype=compute_dtype,
        outlier_threshold=outlier_threshold,
        act_quant_type=act_quant_type,
    )
    return y.reshape(*lead, *axes.sizes(axes.out))


def to_rows(
    x: Float[Array, "*inputs"], contract: Sequence[int], batch: Sequence[int] = ()
) -> Float[Array, "*batch_rest fan_in"]:
    """The input of `contract` as it multiplies matrices.

    Example:
        >>> to_rows(jnp.ones((2, 5, 4, 8)), [2, 3]).shape
        (2, 5, 32)
        >>> to_rows(jnp.ones((2, 5, 3, 8)), [3], [2]).shape
        (3, 10, 8)
    """
    rest = [i for i in range(x.ndim) if i not in (*batch, *contract)]
    stack, rows, sums = ([x.shape[i] for i in part] for part in (batch, rest, contract))
    # A plain matrix takes rows of any rank; only beside a stack are they flattened.
    rows = [math.prod(rows)] if batch else rows
    x = jnp.transpose(x, [*batch, *rest, *contract])
    return x.reshape(*stack, *rows, math.prod(sums))


def einsum_axes(einsum_str: str, kernel_shape: Sequence[int]) -> KernelAxes:
    """The axes of the kernel, the second operand of ``einsum_str``.

    Raises:
        ValueError: it is not a product of an input with a kernel: an axis is summed in
            one operand alone, or is there twice, or the kernel has an ellipsis.

    Example:
        >>> einsum_axes("...td,hdk->...thk", (4, 64, 16))
        KernelAxes(shape=(4, 64, 16), batch=(), contract=(1,), out=(0, 2))
        >>> einsum_axes("ecd,edf->ecf", (8, 64, 256))
        KernelAxes(shape=(8, 64, 256), batch=(0,), contract=(1,), out=(2,))
    """
    inputs, kernel, out = _split(einsum_str)
    if len(kernel) != len(kernel_shape):
        raise ValueError(
            f"{einsum_str!r} is of a kernel with {len(kernel)} axes, got a kernel of "
            f"shape {tuple(kernel_shape)}"
        )
    place = {label: i for i, label in enumerate(kernel)}
    return KernelAxes(
        tuple(kernel_shape),
        tuple(place[c] for c in kernel if c in inputs and c in out),
        tuple(place[c] for c in kernel if c not in out),
        tuple(place[c] for c in kernel if c not in inputs),
    )


def einsum(
    einsum_str: str,
    x: Float[Array, "*inputs"],
    q: QuantizedArray,
    axes: KernelAxes,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
) -> Float[Array, "*outputs"]:
    """``jnp.einsum(einsum_str, x, kernel)`` of a kernel that is held as matrices.

    Args:
        einsum_str: e.g. "...td,hdk->...thk"; of the kernels, `einsum_axes` holds.
        x: any number of axes.
        q: `KernelAxes.to_matrices` of the kernel, quantised along axis -2.
        axes: of the kernel, as it was quantised.
        compute_dtype: as of `jaxbnb.matmul`.
        outlier_threshold: as of `jaxbnb.matmul`.
        act_quant_type: as of `jaxbnb.matmul`.

    Raises:
        ValueError: the kernel was quantised for a product over other axes, or shapes do
            not multiply.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> axes = einsum_axes("ecd,edf->ecf", (3, 64, 32))
        >>> q = jaxbnb.quantize(jnp.ones((3, 64, 32)), "int8", axis=-2)
        >>> einsum("ecd,edf->ecf", jnp.ones((3, 5, 64)), q, axes).shape
        (3, 5, 32)
    """
    wanted = einsum_axes(einsum_str, axes.shape)
    if wanted != axes:
        raise ValueError(
            f"{einsum_str!r} sums over axes {wanted.contract} of the kernel, which was "
            f"quantised in blocks along axes {axes.contract}; quantise it for this "
            "product"
        )
    summed, batch, order = einsum_places(einsum_str, axes, x.shape)
    y = contract(
        x,
        q,
        axes,
        contract=summed,
        batch=batch,
        compute_dtype=compute_dtype,
        outlier_threshold=outlier_threshold,
        act_quant_type=act_quant_type,
    )
    return jnp.transpose(y, order)


def einsum_places(
    einsum_str: str, axes: KernelAxes, shape: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """What of an einsum `contract` needs, for an input of ``shape``.

    Returns:
        The axes of the input that are summed over, and those of the batch, in the order
        of the kernel's; and by what `contract`'s result is transposed.

    Raises:
        ValueError: the input has not the axes that ``einsum_str`` says.

    Example:
        >>> axes = einsum_axes("...td,hdk->...thk", (4, 64, 16))
        >>> einsum_places("...td,hdk->...thk", axes, (2, 7, 64))
        ([2], [], [0, 1, 2, 3])
    """
    inputs, kernel, out = _split(einsum_str)
    # An ellipsis stands for axes that only the input and the result have.
    num_more = len(shape) - len([c for c in inputs if c != "..."])
    if num_more < 0 or (num_more and "..." not in inputs):
        raise ValueError(f"{einsum_str!r} does not fit an input of shape {shape}")
    more = [f"...{i}" for i in range(num_more)]
    inputs, out = (
        [c for part in operand for c in (more if part == "..." else [part])]
        for operand in (inputs, out)
    )
    batch, summed, made = (
        [kernel[i] for i in part] for part in (axes.batch, axes.contract, axes.out)
    )
    rest = [c for c in inputs if c not in (*batch, *summed)]
    got = [*batch, *rest, *made]
    return (
        [inputs.index(c) for c in summed],
        [inputs.index(c) for c in batch],
        [got.index(c) for c in out],
    )


def bias_shape(einsum_str: str, axes: KernelAxes, ndim: int) -> tuple[int, ...]:
    """The shape in which a bias is added to a result of ``ndim`` axes.

    It has every axis of the kernel that the result has, in the order of the result.

    Example:
        >>> axes = einsum_axes("...td,hdk->...thk", (4, 64, 16))
        >>> bias_shape("...td,hdk->...thk", axes, ndim=4)
        (1, 1, 4, 16)
    """
    _, kernel, out = _split(einsum_str)
    num_more = ndim - len([c for c in out if c != "..."])
    sizes = dict(zip(kernel, axes.shape, strict=True))
    shape: list[int] = []
    for c in out:
        shape += [1] * num_more if c == "..." else [sizes.get(c, 1)]
    return tuple(shape)


def _split(einsum_str: str) -> tuple[list[str], list[str], list[str]]:
    """The labels of the input, the kernel and the result; an ellipsis is one."""
    text = einsum_str.replace(" ", "")
    operands, arrow, result = text.partition("->")
    if not arrow or operands.count(",") != 1:
        raise ValueError(
            f"an einsum of an input with a kernel has two operands and '->', got "
            f"{einsum_str!r}"
        )
    parts = (*operands.split(","), result)
    inputs, kernel, out = (re.findall(r"\.{3}|.", part) for part in parts)
    fits = (
        all(len(set(part)) == len(part) for part in (inputs, kernel, out))
        and "..." not in kernel
        and set(kernel) <= set(inputs) | set(out)
        and set(inputs) <= set(kernel) | set(out)
        and set(out) <= set(inputs) | set(kernel)
    )
    if not fits:
        raise ValueError(
            f"{einsum_str!r} is no product with a quantised kernel: each axis must be "
            "in at least two of input, kernel and result, and once in each; an "
            "ellipsis in the input and the result"
        )
    return inputs, kernel, out
