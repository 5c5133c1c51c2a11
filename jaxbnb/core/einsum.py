"""Einsums of an input with a kernel that is stored as matrices."""

import re
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.contraction import KernelAxes, Product, multiply


def einsum_axes(einsum_str: str, kernel_shape: Sequence[int]) -> KernelAxes:
    """Returns the axes of the kernel, the second operand of ``einsum_str``.

    Raises:
        ValueError: it is not a product of an input with a kernel: an axis is summed in
            only one operand or occurs twice in one, or the kernel has an ellipsis.

    Example:
        >>> einsum_axes("...td,hdk->...thk", (4, 64, 16))
        KernelAxes(shape=(4, 64, 16), batch=(), summed=(1,), out=(0, 2))
        >>> einsum_axes("ecd,edf->ecf", (8, 64, 256))
        KernelAxes(shape=(8, 64, 256), batch=(0,), summed=(1,), out=(2,))
    """
    inputs, kernel, out = _split(einsum_str)
    if len(kernel) != len(kernel_shape):
        raise ValueError(
            f"{einsum_str!r} takes a kernel with {len(kernel)} axes, got a kernel of "
            f"shape {tuple(kernel_shape)}"
        )
    place = {label: i for i, label in enumerate(kernel)}
    return KernelAxes(
        tuple(kernel_shape),
        tuple(place[label] for label in kernel if label in inputs and label in out),
        tuple(place[label] for label in kernel if label not in out),
        tuple(place[label] for label in kernel if label not in inputs),
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
    """Computes ``jnp.einsum(einsum_str, x, kernel)`` with a kernel stored as matrices.

    Args:
        einsum_str: equation that `einsum_axes` accepts, e.g. "...td,hdk->...thk".
        x: input with any number of axes.
        q: `KernelAxes.to_matrices` of the kernel, quantised along axis -2.
        axes: axes of the kernel when it was quantised.
        compute_dtype: option of `jaxbnb.matmul`.
        outlier_threshold: option of `jaxbnb.matmul`.
        act_quant_type: option of `jaxbnb.matmul`.

    Raises:
        ValueError: the kernel was quantised for a product over other axes, or the
            shapes do not multiply.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> axes = einsum_axes("ecd,edf->ecf", (3, 64, 32))
        >>> q = jaxbnb.quantize(jnp.ones((3, 64, 32)), "int8", axis=-2)
        >>> einsum("ecd,edf->ecf", jnp.ones((3, 5, 64)), q, axes).shape
        (3, 5, 32)
    """
    product = einsum_product(einsum_str, x.ndim, axes)
    return multiply(
        x,
        q,
        product,
        compute_dtype=compute_dtype,
        outlier_threshold=outlier_threshold,
        act_quant_type=act_quant_type,
    )


def einsum_product(einsum_str: str, ndim: int, axes: KernelAxes) -> Product:
    """Returns the product that ``einsum_str`` is, for an input with ``ndim`` axes.

    Raises:
        ValueError: it does not fit the axes of the kernel or of the input.

    Example:
        >>> axes = einsum_axes("btd,hdk->bhtk", (4, 64, 16))
        >>> einsum_product("btd,hdk->bhtk", 3, axes).order
        (0, 2, 1, 3)
    """
    wanted = einsum_axes(einsum_str, axes.shape)
    if wanted != axes:
        raise ValueError(
            f"{einsum_str!r} sums over axes {wanted.summed} of the kernel, which is "
            f"stored as matrices to be summed over axes {axes.summed}, as quantised "
            "kernels and adapters are; make it for this product"
        )
    inputs, kernel, out = _split(einsum_str)
    # An ellipsis stands for axes that only the input and the result have.
    num_more = ndim - len([label for label in inputs if label != "..."])
    if num_more < 0 or (num_more and "..." not in inputs):
        raise ValueError(f"{einsum_str!r} does not fit an input of {ndim} axes")
    more = [f"...{i}" for i in range(num_more)]
    inputs, out = (
        [label for part in operand for label in (more if part == "..." else [part])]
        for operand in (inputs, out)
    )
    batch, summed, outputs = (
        [kernel[i] for i in part] for part in (axes.batch, axes.summed, axes.out)
    )
    rest = [label for label in inputs if label not in (*batch, *summed)]
    labels = [*batch, *rest, *outputs]
    places = (
        tuple(inputs.index(label) for label in part) for part in (batch, summed, rest)
    )
    return Product(axes, *places, order=tuple(labels.index(label) for label in out))


def bias_shape(einsum_str: str, axes: KernelAxes, ndim: int) -> tuple[int, ...]:
    """Returns the shape that a bias must have to be added to a result of ``ndim`` axes.

    It has the sizes of the kernel's axes in the result, in the order of the result, and
    1 for all other axes.

    Example:
        >>> axes = einsum_axes("...td,hdk->...thk", (4, 64, 16))
        >>> bias_shape("...td,hdk->...thk", axes, ndim=4)
        (1, 1, 4, 16)
    """
    _, kernel, out = _split(einsum_str)
    num_more = ndim - len([label for label in out if label != "..."])
    sizes = dict(zip(kernel, axes.shape, strict=True))
    shape: list[int] = []
    for label in out:
        shape += [1] * num_more if label == "..." else [sizes.get(label, 1)]
    return tuple(shape)


def _split(einsum_str: str) -> tuple[list[str], list[str], list[str]]:
    """The labels of input, kernel and result, where an ellipsis is one label."""
    text = einsum_str.replace(" ", "")
    operands, arrow, result = text.partition("->")
    if not arrow or operands.count(",") != 1:
        raise ValueError(
            f"an einsum of an input with a kernel has two operands and '->', got "
            f"{einsum_str!r}"
        )
    parts = (*operands.split(","), result)
    inputs, kernel, out = (re.findall(r"\.{3}|.", part) for part in parts)
    is_product = (
        all(len(set(part)) == len(part) for part in (inputs, kernel, out))
        and "..." not in kernel
        and set(kernel) <= set(inputs) | set(out)
        and set(inputs) <= set(kernel) | set(out)
        and set(out) <= set(inputs) | set(kernel)
    )
    if not is_product:
        raise ValueError(
            f"{einsum_str!r} is not a product with a quantised kernel: each axis must "
            "be in at least two of input, kernel and result, and once in each; an "
            "ellipsis must be in the input and the result"
        )
    return inputs, kernel, out
