"""The layers that adapters go on: each has a kernel that is held, or seen, as matrices.

An adapter is of the matrices ``(*stack, *batch, fan_in, fan_out)`` of a kernel: the
axes that its product sums over flattened to one, and those of its outputs. ``stack`` is
of a model's layers, ``batch`` of what one layer has several kernels of, e.g. experts.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.contraction import (
    KernelAxes,
    Product,
    general_axes,
    general_product,
    kernel_axes,
)
from jaxbnb.core.einsum import bias_shape, einsum_axes, einsum_product
from jaxbnb.nnx import QuantEinsum, QuantLinear, QuantLinearGeneral

Quantized = QuantLinear | QuantLinearGeneral | QuantEinsum
Base = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | Quantized

_NAMES = "nnx.Linear, nnx.LinearGeneral, nnx.Einsum and their quantised counterparts"


def axes_of(base: Base) -> KernelAxes:
    """The axes of a layer's kernel.

    Raises:
        ValueError: the layer is an einsum that is no product of matrices.
    """
    if isinstance(base, QuantEinsum):
        return base.axes
    if isinstance(base, nnx.Einsum):
        return einsum_axes(_equation(base, None), base.kernel_shape)
    if isinstance(base, nnx.LinearGeneral | QuantLinearGeneral):
        batch, inputs = tuple(base.batch_axis.values()), tuple(base.in_features)
        shape = (*batch, *inputs, *base.out_features)
        return kernel_axes(len(batch), len(inputs), shape)
    return kernel_axes(0, 1, tuple(base.kernel.shape[-2:]))


def stack_of(base: Base) -> tuple[int, ...]:
    """The axes that ``vmap`` or a `jaxbnb.nnx.LayerStack` put before the kernel's."""
    if isinstance(base, nnx.Linear | QuantLinear):
        num_axes = 2
    elif isinstance(base, nnx.Einsum):
        num_axes = len(base.kernel_shape)
    else:
        num_axes = len(axes_of(base).shape)
    shape = tuple(base.kernel.shape)
    return shape[: len(shape) - num_axes]


def num_layers(base: Base) -> int:
    """How many layers a stack has; 1 of a layer that is not stacked."""
    return math.prod(stack_of(base))


def weight_of(base: Base) -> Float32[Array, "*stack_batch fan_in fan_out"]:
    """The matrices that a layer multiplies by, in float32."""
    check_is_matrix(base)
    kernel: Any = base.kernel.get_value()
    if isinstance(kernel, QuantizedArray):
        return kernel.dequantize(jnp.float32)
    return axes_of(base).to_matrices(jnp.asarray(kernel, jnp.float32))


def check_is_matrix(base: nnx.Module) -> None:
    """A subclass may do something else with its kernel.

    Raises:
        ValueError: the layer is a subclass.
    """
    of_flax = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
    if type(base) not in (*of_flax, QuantLinear, QuantLinearGeneral, QuantEinsum):
        raise ValueError(
            "DoRA, merging and adapters that start from the weight need a layer that "
            f"multiplies by its kernel, {_NAMES}; got {type(base)}"
        )


def stored_like(
    base: Base, weight: Float32[Array, "*stack_batch fan_in fan_out"]
) -> Array | QuantizedArray:
    """Matrices in the format, dtype and axes of the kernel that a layer has."""
    kernel: Any = base.kernel.get_value()
    weight = weight.astype(kernel.dtype)
    if isinstance(base, Quantized):
        return base.config.quantize_kernel(weight)
    return axes_of(base).to_kernel(weight)


def quantized(base: Base, config: QuantConfig) -> Quantized:
    """The layer with its kernel quantised."""
    if isinstance(base, nnx.LinearGeneral):
        return QuantLinearGeneral.from_linear_general(base, config)
    if isinstance(base, nnx.Einsum):
        return QuantEinsum.from_einsum(base, config)
    assert isinstance(base, nnx.Linear)
    return QuantLinear.from_linear(base, config)


def product_of(base: Base, ndim: int, einsum_str: str | None) -> Product:
    """How an input of ``ndim`` axes meets the kernel; see `Product`."""
    axes = axes_of(base)
    if isinstance(base, nnx.Einsum | QuantEinsum):
        return einsum_product(_equation(base, einsum_str), ndim, axes)
    if isinstance(base, nnx.Linear | QuantLinear):
        return general_product(ndim, axes, contract=(ndim - 1,))
    # Their places do not depend on the sizes.
    batch, summed, _ = general_axes(
        (0,) * ndim, base.out_features, base.axis, tuple(base.batch_axis)
    )
    return general_product(ndim, axes, contract=summed, batch=batch)


def bias_of(
    base: Base, product: Product, einsum_str: str | None
) -> Float[Array, "*outputs_or_1"] | None:
    """What a layer adds to its product, to be broadcast to the result."""
    if base.bias is None:
        return None
    bias = base.bias[...]
    if isinstance(base, nnx.Einsum | QuantEinsum):
        equation, ndim = _equation(base, einsum_str), len(product.order)
        return bias.reshape(bias_shape(equation, product.axes, ndim))
    return product.columns(bias.reshape(*product.axes.matrix_shape[:-2], -1))


def _equation(base: nnx.Einsum | QuantEinsum, einsum_str: str | None) -> str:
    equation = base.einsum_str if einsum_str is None else einsum_str
    if equation is None:
        raise ValueError(
            "an nnx.Einsum without an einsum_str of its own has no matrices to adapt; "
            "give it one when it is made"
        )
    return equation
