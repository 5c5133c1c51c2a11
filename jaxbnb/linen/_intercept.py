"""use_quantized: runs an unchanged Linen model on quantised variables."""

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
from jaxbnb.core.flax_layers import refuse_custom_product


class Options(NamedTuple):
    """The options of a product that a `jaxbnb.QuantizedArray` does not store."""

    compute_dtype: jax.typing.DTypeLike | None
    outlier_threshold: float | None
    act_quant_type: str | None

    def keywords_for(self, q: QuantizedArray) -> dict[str, Any]:
        """Returns the keyword arguments of a product with ``q``."""
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
    """In this context, Linen models run on variables from `quantize_params`.

    The model is unchanged. An ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum`` or
    ``nn.Embed`` with a quantised weight multiplies by that weight, also under
    ``nn.scan``, ``nn.remat`` and ``nn.vmap``. All other layers run as usual. The dtype
    of a result follows Flax's rule for the layer, from the dtype that the weight had
    before it was quantised.

    The model must be traced inside the context, so put the ``with`` into the function
    that is compiled. Outside, a quantised weight is an error, never a slow path: Flax
    raises ``ScopeParamShapeError``, because codes lack the shape of the kernel.

    Args:
        compute_dtype: option of `jaxbnb.matmul`.
        outlier_threshold: option of `jaxbnb.matmul`, for weights in ``llm_int8``.
        act_quant_type: option of `jaxbnb.matmul`, for weights in fp8.

    Raises:
        TypeError: ``compute_dtype`` is not a floating dtype. The format is not an
            option, because each weight has one.

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
    # Checked here: a config in its place would fail only when a layer is traced.
    compute_dtype = QuantConfig(compute_dtype=compute_dtype).compute_dtype
    options = Options(compute_dtype, outlier_threshold, act_quant_type)

    def intercept(next_fun, args, kwargs, context):
        method, layer = find_method(context), context.module
        if method is None:
            return next_fun(*args, **kwargs)
        q = layer.get_variable("params", method.weight)
        if not isinstance(q, QuantizedArray):
            return next_fun(*args, **kwargs)
        refuse_custom_product(layer)
        return method.call(layer, meta.unbox(q), options, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def unwrap_method(method: Any) -> Any:
    """Returns the function behind a method of a class, or one that is intercepted."""
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
    return einsum_axes(choose_equation(layer, einsum_str), layer.shape)


def _no_axes(layer: nn.Embed, *args: Any) -> None:
    return None


def choose_equation(layer: nn.Einsum, einsum_str: str | None) -> str:
    """Returns the equation of the layer or of the call; there must be exactly one.

    Example:
        >>> choose_equation(nn.Einsum((4, 8)), "bi,io->bo")
        'bi,io->bo'
    """
    return nn.merge_param("einsum_str", layer.einsum_str, einsum_str)


def _cast(
    layer: Any, x: jax.Array, q: QuantizedArray, use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the input and the bias in the dtype that Flax would compute in."""
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
    y = contract(x, q, axes, summed=[x.ndim - 1], **options.keywords_for(q))
    return y if bias is None else y + bias


def _dense_general(
    layer: nn.DenseGeneral, q, options: Options, inputs: jax.Array
) -> jax.Array:
    x, bias = _cast(layer, inputs, q, layer.use_bias)
    batch, summed, axes = _general(layer, x)
    y = contract(x, q, axes, summed=summed, batch=batch, **options.keywords_for(q))
    return y if bias is None else axes.add_bias(y, bias)


def _einsum(
    layer: nn.Einsum,
    q,
    options: Options,
    inputs: jax.Array,
    einsum_str: str | None = None,
) -> jax.Array:
    x, bias = _cast(layer, inputs, q, layer.use_bias)
    einsum_str = choose_equation(layer, einsum_str)
    axes = einsum_axes(einsum_str, layer.shape)
    y = einsum(einsum_str, x, q, axes, **options.keywords_for(q))
    if bias is not None:
        y = y + bias.reshape(bias_shape(einsum_str, axes, y.ndim))
    return y


def _setup_embed(layer: nn.Embed, q, options: Options) -> None:
    # Flax's setup would compare the shape of the codes with the embedding's.
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
    return matmul(x, q.mT, **options.keywords_for(q))


class Method(NamedTuple):
    """A method of Flax that reads a weight, and how it runs on a quantised one.

    Attributes:
        weight: name of the weight in the collection "params".
        axes: function from the layer and its arguments to the axes of the kernel, or
            None for an embedding.
        call: function that runs in place of the method, on the layer, the quantised
            weight, the `Options` and the arguments.
    """

    weight: str
    axes: Callable[..., KernelAxes | None]
    call: Callable[..., Any]


# Keys are functions, not classes: a subclass of nn.Dense that calls its __call__ is
# known too, and a subclass that computes something else is not.
_METHODS = {
    unwrap_method(nn.Dense.__call__): Method("kernel", _dense_axes, _dense),
    unwrap_method(nn.DenseGeneral.__call__): Method(
        "kernel", _general_axes, _dense_general
    ),
    unwrap_method(nn.Einsum.__call__): Method("kernel", _einsum_axes, _einsum),
    unwrap_method(nn.Embed.setup): Method("embedding", _no_axes, _setup_embed),
    unwrap_method(nn.Embed.__call__): Method("embedding", _no_axes, _look_up),
    unwrap_method(nn.Embed.attend): Method("embedding", _no_axes, _attend),
}


def find_method(context: Any) -> Method | None:
    """Finds the method that is intercepted; None if it does not read a weight."""
    return _METHODS.get(unwrap_method(context.orig_method))
