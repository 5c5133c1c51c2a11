"""The layers that can have adapters, and their kernels as matrices.

An adapter treats a kernel as matrices ``(*stack, *batch, fan_in, fan_out)``. The axes
that the product sums over are flattened to ``fan_in``, those of the outputs to
``fan_out``. ``stack`` counts the layers of a model, and ``batch`` the kernels within a
layer, e.g. of experts.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
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
from jaxbnb.nnx import QuantEinsum, QuantEmbed, QuantLinear, QuantLinearGeneral
from jaxbnb_kernels.matmul_dense import matmul_dense

# An embedding multiplies vectors that are 1 at a token's id, and 0 elsewhere.
Embedding = nnx.Embed | QuantEmbed
Quantized = QuantLinear | QuantLinearGeneral | QuantEinsum | QuantEmbed
Base = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | Quantized | Embedding

_NAMES = (
    "nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed and their quantised "
    "counterparts"
)


def get_param(base: Base) -> nnx.Variable[Any]:
    """Returns the variable of a layer's kernel; an embedding is a kernel, too."""
    return base.embedding if isinstance(base, Embedding) else base.kernel


def get_axes(base: Base) -> KernelAxes:
    """Returns the axes of a layer's kernel.

    Raises:
        ValueError: the layer is an einsum that is not a product of matrices.
    """
    if isinstance(base, QuantEinsum):
        return base.axes
    if isinstance(base, nnx.Einsum):
        return einsum_axes(_equation(base, None), base.kernel_shape)
    if isinstance(base, nnx.LinearGeneral | QuantLinearGeneral):
        batch, inputs = tuple(base.batch_axis.values()), tuple(base.in_features)
        shape = (*batch, *inputs, *base.out_features)
        return kernel_axes(len(batch), len(inputs), shape)
    return kernel_axes(0, 1, tuple(get_param(base).shape[-2:]))


def get_stack(base: Base) -> tuple[int, ...]:
    """Returns the axes that ``vmap`` or a `jaxbnb.nnx.LayerStack` added in front."""
    if isinstance(base, nnx.Linear | QuantLinear | Embedding):
        num_axes = 2
    elif isinstance(base, nnx.Einsum):
        num_axes = len(base.kernel_shape)
    else:
        num_axes = len(get_axes(base).shape)
    shape = tuple(get_param(base).shape)
    return shape[: len(shape) - num_axes]


def num_layers(base: Base) -> int:
    """Counts the layers of a stack; 1 for a layer that is not stacked."""
    return math.prod(get_stack(base))


def get_weight(base: Base) -> Float32[Array, "*stack_batch fan_in fan_out"]:
    """Returns the matrices that a layer multiplies by, in float32."""
    check_is_matrix(base)
    kernel: Any = get_param(base).get_value()
    if isinstance(kernel, QuantizedArray):
        return kernel.dequantize(jnp.float32)
    return get_axes(base).to_matrices(jnp.asarray(kernel, jnp.float32))


def check_is_matrix(base: nnx.Module) -> None:
    """Checks that a layer multiplies by its kernel; a subclass might not.

    Raises:
        ValueError: the layer is a subclass.
    """
    flax_types = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed)
    ours = (QuantLinear, QuantLinearGeneral, QuantEinsum, QuantEmbed)
    if type(base) not in (*flax_types, *ours):
        raise ValueError(
            "DoRA, merging and adapters that start from the weight need a layer that "
            f"multiplies by its kernel, {_NAMES}; got {type(base)}"
        )


def store_like(
    base: Base, weight: Float32[Array, "*stack_batch fan_in fan_out"]
) -> Array | QuantizedArray:
    """Converts matrices to the format, dtype and axes of a layer's kernel."""
    kernel: Any = get_param(base).get_value()
    weight = weight.astype(kernel.dtype)
    if isinstance(base, QuantEmbed):
        return base.config.quantize_embedding(weight)
    if isinstance(base, Quantized):
        return base.config.quantize_kernel(weight)
    return get_axes(base).to_kernel(weight)


def quantize_base(base: Base, config: QuantConfig) -> Quantized:
    """Returns the layer with its kernel quantised."""
    if isinstance(base, nnx.LinearGeneral):
        return QuantLinearGeneral.from_linear_general(base, config)
    if isinstance(base, nnx.Einsum):
        return QuantEinsum.from_einsum(base, config)
    if isinstance(base, nnx.Embed):
        return QuantEmbed.from_embed(base, config)
    assert isinstance(base, nnx.Linear)
    return QuantLinear.from_linear(base, config)


def get_product(base: Base, ndim: int, einsum_str: str | None) -> Product:
    """Describes how the layer multiplies an input of ``ndim`` axes; see `Product`."""
    axes = get_axes(base)
    if isinstance(base, nnx.Einsum | QuantEinsum):
        return einsum_product(_equation(base, einsum_str), ndim, axes)
    if isinstance(base, nnx.Linear | QuantLinear):
        return general_product(ndim, axes, summed=(ndim - 1,))
    # An embedding looks up rows instead.
    assert not isinstance(base, Embedding)
    # Only the number of axes matters here, not their sizes.
    batch, summed, _ = general_axes(
        (0,) * ndim, base.out_features, base.axis, tuple(base.batch_axis)
    )
    return general_product(ndim, axes, summed=summed, batch=batch)


def call_base(
    base: Base, inputs: Float[Array, "*inputs"], options: Mapping[str, Any]
) -> Float[Array, "*outputs"]:
    """Calls a layer; an ``nnx.Linear`` of one dtype multiplies by `matmul_dense`."""
    if type(base) is not nnx.Linear:
        return base(inputs, **options)
    is_one_dtype = all(
        x is None or x == inputs.dtype
        for x in (
            *(base.dtype, base.kernel.dtype, base.preferred_element_type),
            None if base.bias is None else base.bias.dtype,
        )
    )
    is_plain = base.dot_general is jax.lax.dot_general and base.precision is None
    if not is_one_dtype or not is_plain:
        return base(inputs, **options)
    y = matmul_dense(inputs, base.kernel[...])
    return y if base.bias is None else y + base.bias[...]


def get_bias(base: Base) -> nnx.Variable[Any] | None:
    """Returns the variable of a layer's bias; None if the layer does not have any."""
    return None if isinstance(base, Embedding) else base.bias


def spread_bias(
    base: Base,
    bias: Float[Array, "*outputs"],
    product: Product,
    einsum_str: str | None,
) -> Float[Array, "*outputs_or_1"]:
    """Reshapes a layer's bias so that it broadcasts to the result."""
    if isinstance(base, nnx.Einsum | QuantEinsum):
        equation, ndim = _equation(base, einsum_str), len(product.order)
        return bias.reshape(bias_shape(equation, product.axes, ndim))
    return product.columns(bias.reshape(*product.axes.matrix_shape[:-2], -1))


def _equation(base: nnx.Einsum | QuantEinsum, einsum_str: str | None) -> str:
    equation = base.einsum_str if einsum_str is None else einsum_str
    if equation is None:
        raise ValueError(
            "an nnx.Einsum made without an einsum_str does not have matrices to adapt; "
            "give it one when you make it"
        )
    return equation
