"""An unchanged Linen model on quantised variables."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxbnb.core import QuantConfig, QuantizedArray, embed, matmul
from jaxbnb.core.contraction import KernelAxes, contract, general_axes
from jaxbnb.core.einsum import bias_shape, einsum, einsum_axes
from jaxbnb.core.flax_layers import refuse_own_product


class Options(NamedTuple):
    """What a product needs that a `jaxbnb.QuantizedArray` does not say."""

    compute_dtype: jax.typing.DTypeLike | None
    outlier_threshold: float | None
    act_quant_type: str | None

    def of(self, q: QuantizedArray) -> dict[str, Any]:
        """The keywords of a product with ``q``."""
        is_int8 = q.quant_type == "llm_int8"
        is_fp8 = q.quant_type.startswith("fp8")
        return {
            "compute_dtype": self.compute_dtype,
            "outlier_threshold": self.outlier_threshold if is_int8 else None,
            "act_quant_type": self.act_quant_type if is_fp8 else None,
        }


@contextlib.contextmanager
def use_quantized(
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
) -> Iterator[None]:
    """Inside it, Linen models run on variables that `quantize_params` made.

    The model is unchanged: wherever an ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum``
    or ``nn.Embed`` has a quantised weight, it multiplies by that, also under
    ``nn.scan``, ``nn.remat`` and ``nn.vmap``. All else runs as it does outside. The
    dtype of a result is what the layer's own rule gives for the weight's dtype before
    it was quantised.

    What matters is that a model is traced inside: have the ``with`` in the function
    that is compiled. Outside, a quantised weight is an error, never a slow path: Flax
    raises ``ScopeParamShapeError``, as codes do not have the shape of the kernel.

    Args:
        compute_dtype: as of `jaxbnb.matmul`.
        outlier_threshold: as of `jaxbnb.matmul`, for weights in ``llm_int8``.
        act_quant_type: as of `jaxbnb.matmul`, for weights in fp8.

    Raises:
        TypeError: ``compute_dtype`` is not a floating dtype. A format is not an option,
            as each weight has its own.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> model, x = nn.Sequential([nn.Dense(128), nn.relu]), jnp.ones((2, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> variables, _ = jaxbnb.linen.quantize_params(model, variables, x)
        >>> @jax.jit
        ... def apply(variables, x):
        ...     with jaxbnb.linen.use_quantized():
        ...         return model.apply(variables, x)
        >>> apply(variables, x).shape
        (2, 128)
    """
    # Otherwise a config would pass as a dtype, and fail only where a layer is traced.
    compute_dtype = QuantConfig(compute_dtype=compute_dtype).compute_dtype
    options = Options(compute_dtype, outlier_threshold, act_quant_type)

    def intercept(next_fun, args, kwargs, context):
        method, layer = method_of(context), context.module
        if method is None:
            return next_fun(*args, **kwargs)
        q = layer.get_variable("params", method.weight)
        if not isinstance(q, QuantizedArray):
            return next_fun(*args, **kwargs)
        refuse_own_product(layer)
        return method.call(layer, meta.unbox(q), options, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def function_of(method: Any) -> Any:
    """The function behind a method, as a class has it or as an interceptor is given."""
    return inspect.unwrap(getattr(method, "func", method))


def _dense_axes(layer: nn.Dense, x: jax.Array) -> KernelAxes:
    return KernelAxes((x.shape[-1], layer.features), (), (0,), (1,))


def _general(layer: nn.DenseGeneral, x: jax.Array) -> Any:
    return general_axes(x.shape, layer.features, layer.axis, layer.batch_dims)


def _general_axes(layer: nn.DenseGeneral, x: jax.Array) -> KernelAxes:
    return _general(layer, x)[-1]


def _einsum_axes(
    layer: nn.Einsum, x: jax.Array, einsum_str: str | None = None
) -> KernelAxes:
    return einsum_axes(equation(layer, einsum_str), layer.shape)


def _no_axes(layer: nn.Embed, *args: Any) -> None:
    return None


def equation(layer: nn.Einsum, einsum_str: str | None) -> str:
    """The layer's equation, or the one that the call gives; both or none is an error.

    Example:
        >>> equation(nn.Einsum((4, 8)), "bi,io->bo")
        'bi,io->bo'
    """
    return nn.merge_param("einsum_str", layer.einsum_str, einsum_str)


def _cast(
    layer: Any, x: jax.Array, q: QuantizedArray, use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The input and the bias in the dtype that Flax would compute in."""
    bias = meta.unbox(layer.get_variable("params", "bias")) if use_bias else None
    bias = meta.unbox(bias)
    dtype = layer.dtype
    if dtype is None:
        dtypes = [x.dtype, q.dtype] if bias is None else [x.dtype, q.dtype, bias.dtype]
        dtype = jnp.result_type(*dtypes)
    return x.astype(dtype), None if bias is None else bias.astype(dtype)


def _dense(layer: nn.Dense, q, options: Options, inputs: jax.Array) -> jax.Array:
    x, bias = _cast(layer, inputs, q, layer.use_bias)
    axes = _dense_axes(layer, x)
    y = contract(x, q, axes, contract=[x.ndim - 1], **options.of(q))
    return y if bias is None else y + bias


def _dense_general(
    layer: nn.DenseGeneral, q, options: Options, inputs: jax.Array
) -> jax.Array:
    x, bias = _cast(layer, inputs, q, layer.use_bias)
    batch, summed, axes = _general(layer, x)
    y = contract(x, q, axes, contract=summed, batch=batch, **options.of(q))
    return y if bias is None else axes.add_bias(y, bias)


def _einsum(
    layer: nn.Einsum,
    q,
    options: Options,
    inputs: jax.Array,
    einsum_str: str | None = None,
) -> jax.Array:
    x, bias = _cast(layer, inputs, q, layer.use_bias)
    einsum_str = equation(layer, einsum_str)
    axes = einsum_axes(einsum_str, layer.shape)
    y = einsum(einsum_str, x, q, axes, **options.of(q))
    if bias is not None:
        y = y + bias.reshape(bias_shape(einsum_str, axes, y.ndim))
    return y


def _setup_embed(layer: nn.Embed, q, options: Options) -> None:
    # Flax's own would compare the shape of the codes with that of the embedding.
    expected = (layer.num_embeddings, layer.features)
    if q.shape != expected:
        raise ValueError(
            f"{layer.path} is an embedding of {expected}; got a QuantizedArray of "
            f"{q.shape}"
        )
    layer.embedding = q


def _look_up(layer: nn.Embed, q, options: Options, inputs: jax.Array) -> jax.Array:
    return embed(inputs, q, dtype=layer.dtype)


def _attend(layer: nn.Embed, q, options: Options, query: jax.Array) -> jax.Array:
    x, _ = _cast(layer, query, q, use_bias=False)
    return matmul(x, q.mT, **options.of(q))


class Method(NamedTuple):
    """What is known of a method of Flax that reads a weight.

    Attributes:
        weight: its name in the collection "params".
        axes: given the layer and its arguments, the kernel's; None of an embedding.
        call: runs in the method's place, given the layer, the quantised weight, the
            `Options` and the arguments.
    """

    weight: str
    axes: Callable[..., KernelAxes | None]
    call: Callable[..., Any]


# By the function and not by the class: what inherits from nn.Dense and calls its
# __call__ is of these too, and what computes otherwise is not.
_METHODS = {
    function_of(nn.Dense.__call__): Method("kernel", _dense_axes, _dense),
    function_of(nn.DenseGeneral.__call__): Method(
        "kernel", _general_axes, _dense_general
    ),
    function_of(nn.Einsum.__call__): Method("kernel", _einsum_axes, _einsum),
    function_of(nn.Embed.setup): Method("embedding", _no_axes, _setup_embed),
    function_of(nn.Embed.__call__): Method("embedding", _no_axes, _look_up),
    function_of(nn.Embed.attend): Method("embedding", _no_axes, _attend),
}


def method_of(context: Any) -> Method | None:
    """What is known of the method that an interceptor's ``context`` is of, if any."""
    return _METHODS.get(function_of(context.orig_method))
