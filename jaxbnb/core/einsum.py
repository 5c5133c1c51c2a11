"""Einsums of an input with a kernel that is held as matrices."""

import re
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.contraction import KernelAxes, Product, multiply


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
    """The product of ``einsum_str`` for an input of ``ndim`` axes.

    Raises:
        ValueError: it is of a kernel with other axes, or an input with others.

    Example:
        >>> axes = einsum_axes("btd,hdk->bhtk", (4, 64, 16))
        >>> einsum_product("btd,hdk->bhtk", 3, axes).order
        (0, 2, 1, 3)
    """
    wanted = einsum_axes(einsum_str, axes.shape)
    if wanted != axes:
        raise ValueError(
            f"{einsum_str!r} sums over axes {wanted.contract} of the kernel, which is "
            f"held as matrices to be summed over axes {axes.contract}, as quantised "
            "kernels and adapters are; make it for this product"
        )
    inputs, kernel, out = _split(einsum_str)
    # An ellipsis stands for axes that only the input and the result have.
    num_more = ndim - len([c for c in inputs if c != "..."])
    if num_more < 0 or (num_more and "..." not in inputs):
        raise ValueError(f"{einsum_str!r} does not fit an input of {ndim} axes")
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
    places = (tuple(inputs.index(c) for c in part) for part in (batch, summed, rest))
    return Product(axes, *places, order=tuple(got.index(c) for c in out))


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
