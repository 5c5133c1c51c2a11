"""Kernels with any number of axes, held and multiplied as matrices."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

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

    def matrix_names(self, names: Sequence[Any], num_stack: int = 0) -> tuple[Any, ...]:
        """The names of the axes of the matrices, given those of the kernel's axes.

        Axes that are flattened to one get the first name among them.

        Args:
            names: names of the axes of a kernel ``(*stack, *shape)``; if there are
                fewer, of its first axes.
            num_stack: how many axes the kernel has before ``shape``.

        Example:
            >>> heads = KernelAxes((64, 4, 8), batch=(), contract=(0,), out=(1, 2))
            >>> heads.matrix_names(("layers", "embed", "heads", None), num_stack=1)
            ('layers', 'embed', 'heads')
        """
        count = num_stack + len(self.shape)
        names = [*names, *[None] * (count - len(names))]
        stack, own = names[:num_stack], names[num_stack:]
        fans = (
            next((own[i] for i in axes if own[i] is not None), None)
            for axes in (self.contract, self.out)
        )
        return *stack, *(own[i] for i in self.batch), *fans

    def kernel_names(self, names: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of `matrix_names`. The first of flattened axes gets the name."""
        num_stack = len(names) - len(self.matrix_shape)
        *batch, fan_in, fan_out = names[num_stack:]
        found: list[Any] = [None] * len(self.shape)
        firsts = [*self.batch, *self.contract[:1], *self.out[:1]]
        for axis, name in zip(firsts, [*batch, fan_in, fan_out], strict=True):
            found[axis] = name
        return *names[:num_stack], *found

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


@dataclasses.dataclass(frozen=True)
class Product:
    """Which axes of an input meet those of a kernel, and where the result has them.

    Attributes:
        axes: of the kernel.
        batch: the axes of the input that go along with the kernel's batch axes.
        contract: those that are summed over, in the order of the kernel's.
        rest: the others.
        order: where each axis of the result is among batch, rest and outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> axes = kernel_axes(0, 1, (64, 4, 16))
        >>> product = general_product(3, axes, contract=(2,))
        >>> matrix = jnp.ones((64, 4 * 16))
        >>> product(jnp.ones((2, 5, 64)), lambda rows: rows @ matrix).shape
        (2, 5, 4, 16)
        >>> product.columns(jnp.ones(4 * 16)).shape
        (1, 1, 4, 16)
    """

    axes: KernelAxes
    batch: tuple[int, ...]
    contract: tuple[int, ...]
    rest: tuple[int, ...]
    order: tuple[int, ...]

    def __call__(
        self,
        x: Float[Array, "*inputs"],
        multiply: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    ) -> Float[Array, "*outputs"]:
        """The result, given how rows are multiplied.

        Args:
            x: the input.
            multiply: of rows ``(*rest, fan_in)`` makes ``(*rest, fan_out)``; beside
                batch axes of ``(*batch, num_rows, fan_in)`` the same with ``fan_out``.

        Raises:
            ValueError: the input does not fit the kernel.
        """
        axes = self.axes
        lead = tuple(x.shape[i] for i in (*self.batch, *self.rest))
        y = multiply(self.rows(x)).reshape(*lead, *axes.sizes(axes.out))
        return jnp.transpose(y, self.order)

    def rows(self, x: Float[Array, "*inputs"]) -> Float[Array, "*batch_rest fan_in"]:
        """The input as it is multiplied.

        Raises:
            ValueError: it does not fit the kernel.
        """
        axes = self.axes
        got = tuple(x.shape[axis] for axis in (*self.batch, *self.contract))
        expected = axes.sizes((*axes.batch, *axes.contract))
        if got != expected:
            raise ValueError(
                f"shapes do not multiply: axes {(*self.batch, *self.contract)} of an "
                f"input of shape {x.shape} must be {expected} for a kernel of shape "
                f"{axes.shape}"
            )
        *batch, fan_in, _ = axes.matrix_shape
        rest = [x.shape[i] for i in self.rest]
        x = jnp.transpose(x, [*self.batch, *self.rest, *self.contract])
        # A plain matrix takes rows of any rank; only beside a stack are they flattened.
        return x.reshape(*batch, *([math.prod(rest)] if batch else rest), fan_in)

    def columns(
        self, values: Float[Array, "*batch fan_out"]
    ) -> Float[Array, "*outputs_or_1"]:
        """A number for each column of the kernel, to be broadcast to the result."""
        axes, ones = self.axes, (1 for _ in self.rest)
        values = values.reshape(*axes.sizes(axes.batch), *ones, *axes.sizes(axes.out))
        return jnp.transpose(values, self.order)


def general_product(
    ndim: int, axes: KernelAxes, *, contract: Sequence[int], batch: Sequence[int] = ()
) -> Product:
    """The product of ``jax.lax.dot_general``: batch axes, then the rest, then outputs.

    Args:
        ndim: the axes that the input has.
        axes: of the kernel.
        contract: as of `Product`.
        batch: as of `Product`.

    Example:
        >>> axes = kernel_axes(1, 1, (8, 64, 256))
        >>> general_product(3, axes, contract=(2,), batch=(0,)).rest
        (1,)
    """
    rest = tuple(i for i in range(ndim) if i not in (*batch, *contract))
    order = range(len(batch) + len(rest) + len(axes.out))
    return Product(axes, tuple(batch), tuple(contract), rest, tuple(order))


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
    product = general_product(x.ndim, axes, contract=contract, batch=batch)
    return multiply(
        x,
        q,
        product,
        compute_dtype=compute_dtype,
        outlier_threshold=outlier_threshold,
        act_quant_type=act_quant_type,
    )


def multiply(
    x: Float[Array, "*inputs"], q: QuantizedArray, product: Product, **options: Any
) -> Float[Array, "*outputs"]:
    """A product with a quantised kernel, with the options of `jaxbnb.matmul`."""
    if q.shape != product.axes.matrix_shape:
        raise ValueError(
            f"a kernel of shape {product.axes.shape} is held as "
            f"{product.axes.matrix_shape}, got a QuantizedArray of {q.shape}; a stack "
            "of layers has its axis first, and is sliced before a layer is called"
        )
    return product(x, lambda rows: matmul(rows, q, **options))
