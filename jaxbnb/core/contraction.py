"""Kernels with any number of axes, stored and multiplied as matrices."""

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
    """The roles of a kernel's axes: batch, summed over, or output.

    A quantised kernel is stored as ``(*stack, *batch, fan_in, fan_out)``. The axes that
    are summed over are flattened to ``fan_in``, along which blocks run, and the output
    axes to ``fan_out``. ``stack`` are the axes that ``vmap`` or ``scan`` added to stack
    layers.

    Attributes:
        shape: shape of the kernel, without ``stack``.
        batch: axes that the input and the result have too, e.g. one for experts.
        summed: axes that the product sums over.
        out: all other axes, which the result has.

    Example:
        >>> import jax.numpy as jnp
        >>> heads = KernelAxes((4, 8, 64), batch=(), summed=(0, 1), out=(2,))
        >>> heads.to_matrices(jnp.ones((12, 4, 8, 64))).shape
        (12, 32, 64)
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    summed: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order of the matrices."""
        return (*self.batch, *self.summed, *self.out)

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Returns the sizes of these axes of the kernel."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrices, ``(*batch, fan_in, fan_out)``."""
        fans = (math.prod(self.sizes(axes)) for axes in (self.summed, self.out))
        return *self.sizes(self.batch), *fans

    def to_matrices(self, kernel: Float[Array, "*kernel"]) -> Float[Array, "*matrices"]:
        """Reshapes a kernel ``(*stack, *shape)`` to matrices.

        Raises:
            ValueError: its last axes are not ``shape``.
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
        """Inverts `to_matrices`."""
        stack = matrices.shape[: matrices.ndim - len(self.matrix_shape)]
        x = matrices.reshape(*stack, *self.sizes(self.order))
        inverse = [len(stack) + self.order.index(i) for i in range(len(self.shape))]
        return jnp.transpose(x, [*range(len(stack)), *inverse])

    def matrix_names(self, names: Sequence[Any], num_stack: int = 0) -> tuple[Any, ...]:
        """Returns names for the axes of the matrices, given names for the kernel's.

        An axis that was flattened from several gets the first name among them.

        Args:
            names: names for the axes of a kernel ``(*stack, *shape)``. If there are too
                few, the last axes have none.
            num_stack: number of axes that the kernel has before ``shape``.

        Example:
            >>> heads = KernelAxes((64, 4, 8), batch=(), summed=(0,), out=(1, 2))
            >>> heads.matrix_names(("layers", "embed", "heads", None), num_stack=1)
            ('layers', 'embed', 'heads')
        """
        count = num_stack + len(self.shape)
        names = [*names, *[None] * (count - len(names))]
        stack, names = names[:num_stack], names[num_stack:]
        fans = (
            next((names[i] for i in axes if names[i] is not None), None)
            for axes in (self.summed, self.out)
        )
        return *stack, *(names[i] for i in self.batch), *fans

    def kernel_names(self, names: Sequence[Any]) -> tuple[Any, ...]:
        """Inverts `matrix_names`; the first of several flattened axes gets the name."""
        num_stack = len(names) - len(self.matrix_shape)
        *batch, fan_in, fan_out = names[num_stack:]
        found: list[Any] = [None] * len(self.shape)
        firsts = [*self.batch, *self.summed[:1], *self.out[:1]]
        for axis, name in zip(firsts, [*batch, fan_in, fan_out], strict=True):
            found[axis] = name
        return *names[:num_stack], *found

    def add_bias(
        self, y: Float[Array, "*batch_rest_out"], bias: Float[Array, "*batch_out"]
    ) -> Float[Array, "*batch_rest_out"]:
        """Adds a bias, which has batch and output axes, to a result of `contract`."""
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
    """Returns the axes that Flax's ``nn.DenseGeneral`` sums over, and its kernel's.

    Args:
        shape: shape of the input.
        features: sizes of the last axes of the result.
        axis: axes of the input that are summed over.
        batch_dims: leading axes of the input; each of their elements has its own
            kernel.

    Returns:
        ``batch`` and ``summed`` as in `contract`, and the kernel's axes.

    Example:
        >>> batch, summed, axes = general_axes((2, 5, 4, 32), 64, (-2, -1))
        >>> batch, summed, axes.shape, axes.matrix_shape
        ([], [2, 3], (4, 32, 64), (128, 64))
    """
    features, axis = (
        (x,) if isinstance(x, int) else tuple(x) for x in (features, axis)
    )
    # Flax sorts them, in whatever order they are given.
    batch, summed = (
        sorted(i % len(shape) for i in axes) for axes in (batch_dims, axis)
    )
    if batch != list(range(len(batch))):
        raise ValueError(f"batch_dims must be the leading axes, got {batch_dims}")
    sizes = [shape[i] for i in (*batch, *summed)]
    return batch, summed, kernel_axes(len(batch), len(axis), (*sizes, *features))


def kernel_axes(num_batch: int, num_summed: int, shape: tuple[int, ...]) -> KernelAxes:
    """Returns the axes of a kernel in the order batch, summed, output.

    Example:
        >>> kernel_axes(1, 2, (8, 4, 32, 64))
        KernelAxes(shape=(8, 4, 32, 64), batch=(0,), summed=(1, 2), out=(3,))
    """
    batch, summed, out = np.split(
        np.arange(len(shape)), [num_batch, num_batch + num_summed]
    )
    return KernelAxes(shape, *(tuple(axes.tolist()) for axes in (batch, summed, out)))


@dataclasses.dataclass(frozen=True)
class Product:
    """How the axes of an input match those of a kernel, and the axes of the result.

    Attributes:
        axes: axes of the kernel.
        batch: axes of the input that match the kernel's batch axes.
        summed: axes of the input that are summed over, in the kernel's order.
        rest: all other axes of the input.
        order: position of each axis of the result among batch, rest and outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> axes = kernel_axes(0, 1, (64, 4, 16))
        >>> product = general_product(3, axes, summed=(2,))
        >>> matrix = jnp.ones((64, 4 * 16))
        >>> product(jnp.ones((2, 5, 64)), lambda rows: rows @ matrix).shape
        (2, 5, 4, 16)
        >>> product.columns(jnp.ones(4 * 16)).shape
        (1, 1, 4, 16)
        >>> product.result_rows(jnp.ones((2, 5, 4, 16))).shape
        (10, 64)
    """

    axes: KernelAxes
    batch: tuple[int, ...]
    summed: tuple[int, ...]
    rest: tuple[int, ...]
    order: tuple[int, ...]

    def __call__(
        self,
        x: Float[Array, "*inputs"],
        multiply: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    ) -> Float[Array, "*outputs"]:
        """Computes the result with a function that multiplies rows.

        Args:
            x: input of the product.
            multiply: function from rows ``(*rest, fan_in)`` to ``(*rest, fan_out)``.
                With batch axes, it maps ``(*batch, num_rows, fan_in)`` to
                ``(*batch, num_rows, fan_out)``.

        Raises:
            ValueError: the input does not fit the kernel.
        """
        axes = self.axes
        lead = tuple(x.shape[i] for i in (*self.batch, *self.rest))
        y = multiply(self.rows(x)).reshape(*lead, *axes.sizes(axes.out))
        return jnp.transpose(y, self.order)

    def rows(self, x: Float[Array, "*inputs"]) -> Float[Array, "*batch_rest fan_in"]:
        """Reshapes the input to the rows that are multiplied.

        Raises:
            ValueError: the input does not fit the kernel.
        """
        axes = self.axes
        got = tuple(x.shape[axis] for axis in (*self.batch, *self.summed))
        expected = axes.sizes((*axes.batch, *axes.summed))
        if got != expected:
            raise ValueError(
                f"shapes do not multiply: axes {(*self.batch, *self.summed)} of an "
                f"input of shape {x.shape} must be {expected} for a kernel of shape "
                f"{axes.shape}"
            )
        *batch, fan_in, _ = axes.matrix_shape
        rest = [x.shape[i] for i in self.rest]
        x = jnp.transpose(x, [*self.batch, *self.rest, *self.summed])
        # A single matrix takes rows of any rank; a stack needs them flattened.
        return x.reshape(*batch, *([math.prod(rest)] if batch else rest), fan_in)

    def result_rows(
        self, y: Float[Array, "*outputs"]
    ) -> Float[Array, "*batch num_rows fan_out"]:
        """Reshapes a result to the rows that were computed, in the order of `rows`."""
        *batch, _, fan_out = self.axes.matrix_shape
        inverse = [self.order.index(i) for i in range(y.ndim)]
        return jnp.transpose(y, inverse).reshape(*batch, -1, fan_out)

    def columns(
        self, values: Float[Array, "*batch fan_out"]
    ) -> Float[Array, "*outputs_or_1"]:
        """Reshapes one value per column of the kernel, to broadcast to the result."""
        axes, ones = self.axes, (1 for _ in self.rest)
        values = values.reshape(*axes.sizes(axes.batch), *ones, *axes.sizes(axes.out))
        return jnp.transpose(values, self.order)


def general_product(
    ndim: int, axes: KernelAxes, *, summed: Sequence[int], batch: Sequence[int] = ()
) -> Product:
    """Returns the product with axes in the order of ``jax.lax.dot_general``.

    The result has the batch axes first, then the rest, then the outputs.

    Args:
        ndim: number of axes of the input.
        axes: axes of the kernel.
        summed: axes of the input that are summed over, in the kernel's order.
        batch: axes of the input that match the kernel's batch axes.

    Example:
        >>> axes = kernel_axes(1, 1, (8, 64, 256))
        >>> general_product(3, axes, summed=(2,), batch=(0,)).rest
        (1,)
    """
    rest = tuple(i for i in range(ndim) if i not in (*batch, *summed))
    order = range(len(batch) + len(rest) + len(axes.out))
    return Product(axes, tuple(batch), tuple(summed), rest, tuple(order))


def contract(
    x: Float[Array, "*inputs"],
    q: QuantizedArray,
    axes: KernelAxes,
    *,
    summed: Sequence[int],
    batch: Sequence[int] = (),
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
) -> Float[Array, "*batch_rest_out"]:
    """Computes ``jax.lax.dot_general`` of ``x`` and a kernel stored as matrices.

    Args:
        x: input with any number of axes.
        q: `KernelAxes.to_matrices` of the kernel, quantised along axis -2.
        axes: axes of the kernel.
        summed: axes of ``x`` that are summed over, in the kernel's order.
        batch: axes of ``x`` that match the kernel's batch axes.
        compute_dtype: option of `jaxbnb.matmul`.
        outlier_threshold: option of `jaxbnb.matmul`.
        act_quant_type: option of `jaxbnb.matmul`.

    Returns:
        The product in the dtype of ``x``: the batch axes, then the other axes of ``x``,
        then the outputs of the kernel.

    Raises:
        ValueError: the shape of ``q`` or ``x`` does not match ``axes``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> axes = KernelAxes((4, 8, 64), batch=(), summed=(0, 1), out=(2,))
        >>> matrix = axes.to_matrices(jnp.ones((4, 8, 64)))
        >>> q = jaxbnb.quantize(matrix, "int8", axis=-2)
        >>> contract(jnp.ones((2, 5, 4, 8)), q, axes, summed=(2, 3)).shape
        (2, 5, 64)
    """
    product = general_product(x.ndim, axes, summed=summed, batch=batch)
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
    """Multiplies by a quantised kernel, with the options of `jaxbnb.matmul`."""
    if q.shape != product.axes.matrix_shape:
        raise ValueError(
            f"a kernel of shape {product.axes.shape} is stored as "
            f"{product.axes.matrix_shape}, got a QuantizedArray of {q.shape}; a stack "
            "of layers has its axis first, and is sliced before a layer is called"
        )
    return product(x, lambda rows: matmul(rows, q, **options))
