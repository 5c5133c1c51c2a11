"""Calls of Linen models: the linear layers that they reach, and their products."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from flax.core import FrozenDict

from jaxbnb.core.contraction import (
    KernelAxes,
    Product,
    general_axes,
    general_product,
    kernel_axes,
)
from jaxbnb.core.einsum import einsum_axes, einsum_product
from jaxbnb.linen._dense import QuantDense
from jaxbnb.linen._dense_general import QuantDenseGeneral
from jaxbnb.linen._intercept import (
    choose_equation,
    find_method,
    unwrap_method,
    use_quantized,
)

Tree = dict[str, Any] | FrozenDict[str, Any]

# The equivalent functions for an NNX model.
_NNX: Final = {
    "quantize_params": "jaxbnb.nnx.quantize_model(model, config)",
    "dequantize_params": "jaxbnb.nnx.dequantize_model(model)",
    "outlier_columns": "jaxbnb.nnx.outlier_columns(model, x)",
    "calibrate_params": "jaxbnb.calibrate(model, batches)",
}


class Layer(NamedTuple):
    """A layer that a call reaches and that can be quantised.

    Attributes:
        module: the layer.
        key: path of its weight in the collection "params".
        axes: axes of its kernel; None for an embedding.
    """

    module: nn.Module
    key: tuple[str, ...]
    axes: KernelAxes | None


def check_linen(model: Any, variables: Any, function: str) -> None:
    """Raises unless a function was given a model and its variables.

    Raises:
        TypeError: ``model`` is not a Linen module; the message names the function for
            it.
        ValueError: ``variables`` has no collection of parameters.
    """
    if not isinstance(model, nn.Module):
        got, hint = type(model).__name__, ""
        if isinstance(model, nnx.Module):
            twin = _NNX[function]
            got, hint = f"the NNX model {got}", f"; for that, use {twin}"
        raise TypeError(
            f"{function} takes a Linen module and its variables; got {got}{hint}"
        )
    is_mapping = isinstance(variables, Mapping)
    if not is_mapping or not {"params", "quantized"} & set(variables):
        got = list(variables) if is_mapping else type(variables).__name__
        raise ValueError(
            f"{function} takes the variables that model.init gave, a dict of "
            f"collections with 'params' among them; got {got}. For parameters alone, "
            "give {'params': params}"
        )


def trace_layers(
    model: nn.Module, variables: Tree, args: tuple[Any, ...], kwargs: Any
) -> dict[str, Layer]:
    """Returns the layers that a call reaches and that can be quantised, by path."""
    layers: dict[str, Layer] = {}

    def record(next_fun, args, kwargs, context):
        method, module = find_method(context), context.module
        if method is not None and module.has_variable("params", method.weight):
            path = ".".join(module.path)
            axes = method.axes(module, *args, **kwargs)
            layer = Layer(module, (*module.path, method.weight), axes)
            if layers.setdefault(path, layer).axes != axes:
                raise ValueError(
                    f"{path} multiplies by one kernel in two ways, as {axes} and as "
                    f"{layers[path].axes}; blocks run along one"
                )
        return next_fun(*args, **kwargs)

    apply, arrays = split_arrays(model.apply, args, kwargs)

    def call(variables, arrays):
        # The outer interceptor is called first, so it sees quantised layers too.
        with nn.intercept_methods(record), use_quantized():
            apply(variables, arrays)

    jax.eval_shape(call, variables, arrays)
    return layers


def split_arrays(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """Splits the arrays from the arguments of a function, and binds the rest."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def call_with_arrays(first, arrays):
        filled = dict(zip(places, arrays, strict=True))
        args, kwargs = treedef.unflatten(
            [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return function(first, *args, **kwargs)

    return call_with_arrays, [leaves[i] for i in places]


def find_product(context: Any) -> Callable[..., tuple[Product, jax.Array]] | None:
    """Finds the product of a linear layer that is intercepted; None for other calls.

    Returns:
        A function of the layer and its arguments, which returns the product and its
        input.
    """
    return _PRODUCTS.get(unwrap_method(context.orig_method))


def _dense(
    layer: nn.Dense | QuantDense, inputs: jax.Array
) -> tuple[Product, jax.Array]:
    axes = kernel_axes(0, 1, (inputs.shape[-1], layer.features))
    return general_product(inputs.ndim, axes, summed=[inputs.ndim - 1]), inputs


def _general(
    layer: nn.DenseGeneral | QuantDenseGeneral, inputs: jax.Array
) -> tuple[Product, jax.Array]:
    batch, summed, axes = general_axes(
        inputs.shape, layer.features, layer.axis, layer.batch_dims
    )
    return general_product(inputs.ndim, axes, summed=summed, batch=batch), inputs


def _einsum(
    layer: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None
) -> tuple[Product, jax.Array]:
    einsum_str = choose_equation(layer, einsum_str)
    axes = einsum_axes(einsum_str, layer.shape)
    return einsum_product(einsum_str, inputs.ndim, axes), inputs


_PRODUCTS: Final[dict[Any, Callable[..., tuple[Product, jax.Array]]]] = {
    unwrap_method(nn.Dense.__call__): _dense,
    unwrap_method(QuantDense.__call__): _dense,
    unwrap_method(nn.DenseGeneral.__call__): _general,
    unwrap_method(QuantDenseGeneral.__call__): _general,
    unwrap_method(nn.Einsum.__call__): _einsum,
}
