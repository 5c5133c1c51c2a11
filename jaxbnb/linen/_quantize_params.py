"""quantize_params and back: the variables of an unchanged Linen model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.contraction import KernelAxes
from jaxbnb.core.flax_layers import refuse_own_product
from jaxbnb.core.formats import CODEBOOKS
from jaxbnb.core.rules import FORM, Report, Rule, check_rules, choose_formats
from jaxbnb.linen._intercept import method_of, use_quantized
from jaxbnb.linen.boxes import dequantize_boxed, quantize_boxed, take_out

Tree = dict[str, Any] | FrozenDict[str, Any]

# The functions that do the same for an NNX model.
_NNX: Final = {
    "quantize_params": "quantize_model(model, config)",
    "dequantize_params": "dequantize_model(model)",
    "outlier_columns": "outlier_columns(model, x)",
}


class _Layer(NamedTuple):
    """A layer that was called, the key of its weight in the parameters, its axes."""

    module: nn.Module
    key: tuple[str, ...]
    axes: KernelAxes | None


def quantize_params(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
    **kwargs: Any,
) -> tuple[dict[str, Any], Report]:
    """The variables of a Linen model, the kernels of its linear layers quantised.

    The model stays as it is, and runs on them inside `use_quantized`. Which arrays are
    kernels, and over which of their axes products sum, is found by tracing one call,
    ``model.apply(variables, *args, **kwargs)``; nothing is computed. A kernel is held
    as a matrix, the axes that are summed over flattened to one, along which blocks run.
    Layers stacked by ``nn.scan`` or ``nn.vmap`` along axis 0 are quantised one by one.

    Quantised kernels are where the others were, in the collection ``"params"``, so that
    transforms carry them as they did. They are frozen, and ``jax.grad`` refuses their
    codes: take them apart with `split_quantized` to train the rest. A kernel in a box,
    such as ``nn.Partitioned``, has its codes and absmax each in one. Their axes have
    the names of the kernel's axes, in the order in which they are stored.

    Args:
        model: a Linen module, unbound.
        variables: variables of the model, or their shapes from
            ``jax.eval_shape(model.init, ...)``; the result is then abstract too.
        *args: of a call; arrays may be ``jax.ShapeDtypeStruct``.
        config: format of the kernels, or its name. Give its ``compute_dtype``,
            ``outlier_threshold`` and ``act_quant_type`` to `use_quantized`.
        rules: ``(layers, config)`` pairs, which go before ``config`` and ``skip``: the
            first one that names a layer decides its format, or with None that it is
            left alone. An ``nn.Embed`` is quantised only where one says so.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.
        **kwargs: of a call, and of ``apply``: ``method``, ``rngs``, ``mutable``.

    Returns:
        ``(variables, report)``. The report is a list of the dotted paths of the layers
        that were quantised; its ``left_alone`` has the shapes of the large parameters
        that were not, among them those of layers that the call did not reach.

    Raises:
        TypeError: ``model`` is not a Linen module, or ``rules`` are not pairs.
        ValueError: no layer was quantised, or all are already, or a rule decides over
            none; or a layer is stacked along another axis than the first, multiplies by
            one kernel in two ways, or is an ``nn.Einsum`` that is not a product of
            matrices.
        NotImplementedError: a layer has a ``dot_general`` of its own.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> model = nn.MultiHeadDotProductAttention(num_heads=4)
        >>> x = jnp.ones((2, 5, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> variables, report = jaxbnb.linen.quantize_params(
        ...     model, variables, x, rules=[(["value"], None)])
        >>> report, report.left_alone
        (['query', 'key', 'out'], {'value.kernel': (64, 4, 16)})
        >>> variables["params"]["out"]["kernel"].shape
        (64, 64)
        >>> with jaxbnb.linen.use_quantized():
        ...     model.apply(variables, x).shape
        (2, 5, 64)
    """
    check_linen(model, variables, "quantize_params")
    check_rules(rules, FORM)
    try:
        layers = _trace(model, variables, args, kwargs)
    except TypeError as error:
        # The error of the model's own call would only count arguments.
        formats = [argument for argument in args if _is_format(argument)]
        if not formats:
            raise
        raise TypeError(
            f"{error}; give quantize_params the format by keyword: "
            f"config={formats[0]!r}"
        ) from error
    params = _flatten(variables)
    weights = {path: params[layer.key] for path, layer in layers.items()}
    quantized = {
        path: weight.quant_type
        for path, weight in weights.items()
        if isinstance(weight, QuantizedArray)
    }
    for key, q in _flatten(variables, "quantized").items():
        if isinstance(q, QuantizedArray):
            quantized[".".join(key[:-1]) or "model"] = q.quant_type
    formats = choose_formats(
        {p: layer.axes is None for p, layer in layers.items() if p not in quantized},
        config,
        rules,
        skip,
        type(model).__name__,
        quantized,
    )
    for path, chosen in formats.items():
        layer, weight = layers[path], weights[path]
        try:
            refuse_own_product(layer.module)
            quantize = (
                chosen.quantize_embedding
                if layer.axes is None
                else chosen.quantize_kernel
            )
            params[layer.key] = quantize_boxed(weight, quantize, layer.axes)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error
    others = {
        ".".join(key): value
        for key, leaf in params.items()
        if not isinstance(value := take_out(leaf), QuantizedArray)
    }
    new = {**unfreeze(variables), "params": unflatten_dict(params)}
    return new, Report(formats, others)


def dequantize_params(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    dtype: jax.typing.DTypeLike | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The variables with every weight decoded, in the shapes that the model made.

    Args:
        model: as of `quantize_params`.
        variables: what `quantize_params` returned.
        *args: of a call, which is traced to learn the shapes.
        dtype: of the decoded weights; None for what was quantised.
        **kwargs: of a call, and of ``apply``.

    Raises:
        TypeError: ``model`` is not a Linen module.
        ValueError: no weight is quantised, or one is of a layer that is not called.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> model, x = nn.DenseGeneral((4, 16)), jnp.ones((2, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> quantized, _ = jaxbnb.linen.quantize_params(model, variables, x)
        >>> decoded = jaxbnb.linen.dequantize_params(model, quantized, x)
        >>> decoded["params"]["kernel"].shape
        (64, 4, 16)
    """
    check_linen(model, variables, "dequantize_params")
    axes = {
        layer.key: layer.axes
        for layer in _trace(model, variables, args, kwargs).values()
    }
    params = _flatten(variables)
    quantized = [k for k, leaf in params.items() if isinstance(leaf, QuantizedArray)]
    unknown = [".".join(key) for key in quantized if key not in axes]
    if unknown or not quantized:
        raise ValueError(
            f"{type(model).__name__} has no quantised parameters"
            if not quantized
            else f"the call does not reach the layers of {unknown}; trace one that does"
        )
    for key in quantized:
        params[key] = dequantize_boxed(params[key], dtype, axes[key])
    return {**unfreeze(variables), "params": unflatten_dict(params)}


def split_quantized(params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the parameters that are trained from those that are frozen.

    Args:
        params: the collection ``"params"`` of `quantize_params`.

    Returns:
        ``(trained, quantized)``, two nested dictionaries; `merge_quantized` is the
        inverse. They are as the collections ``"params"`` and ``"quantized"`` of a model
        of `jaxbnb.QuantDense` layers.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> model, x = nn.Dense(128), jnp.ones((2, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> variables, _ = jaxbnb.linen.quantize_params(model, variables, x)
        >>> params, quantized = jaxbnb.linen.split_quantized(variables["params"])
        >>> def loss(params):
        ...     merged = jaxbnb.linen.merge_quantized(params, quantized)
        ...     with jaxbnb.linen.use_quantized():
        ...         return jnp.sum(model.apply({"params": merged}, x))
        >>> jax.tree.map(jnp.shape, jax.grad(loss)(params))
        {'bias': (128,)}
    """
    flat = flatten_dict(unfreeze(params))
    frozen = {k: v for k, v in flat.items() if isinstance(v, QuantizedArray)}
    trained = {k: v for k, v in flat.items() if k not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge_quantized(trained: Tree, quantized: Tree) -> dict[str, Any]:
    """The parameters that `split_quantized` took apart.

    Raises:
        ValueError: a parameter is in both.

    Example:
        >>> import jaxbnb
        >>> jaxbnb.linen.merge_quantized({"a": {"bias": 0}}, {"a": {"kernel": 1}})
        {'a': {'bias': 0, 'kernel': 1}}
    """
    first, second = (flatten_dict(unfreeze(tree)) for tree in (trained, quantized))
    both = [".".join(key) for key in first.keys() & second.keys()]
    if both:
        raise ValueError(f"trained and quantised both have {sorted(both)}")
    return unflatten_dict({**first, **second})


def check_linen(model: Any, variables: Any, function: str) -> None:
    """Raises unless a function of `jaxbnb.linen` was given a model and its variables.

    Raises:
        TypeError: ``model`` is not a Linen module; the message names the function for
            it.
        ValueError: ``variables`` has no collection of parameters.
    """
    if not isinstance(model, nn.Module):
        got, hint = type(model).__name__, ""
        if isinstance(model, nnx.Module):
            twin = _NNX[function]
            got, hint = f"the NNX model {got}", f"; for that, use jaxbnb.nnx.{twin}"
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


def _flatten(variables: Tree, collection: str = "params") -> dict[tuple[str, ...], Any]:
    tree: Any = variables.get(collection, {})
    return flatten_dict(unfreeze(tree))


def _trace(
    model: nn.Module, variables: Tree, args: tuple[Any, ...], kwargs: Any
) -> dict[str, _Layer]:
    """The layers that a call reaches whose weights can be quantised, by dotted path."""
    layers: dict[str, _Layer] = {}

    def record(next_fun, args, kwargs, context):
        method, module = method_of(context), context.module
        if method is not None and module.has_variable("params", method.weight):
            path = ".".join(module.path)
            axes = method.axes(module, *args, **kwargs)
            layer = _Layer(module, (*module.path, method.weight), axes)
            if layers.setdefault(path, layer).axes != axes:
                raise ValueError(
                    f"{path} multiplies by one kernel in two ways, as {axes} and as "
                    f"{layers[path].axes}; blocks run along one"
                )
        return next_fun(*args, **kwargs)

    apply, arrays = by_arrays(model.apply, args, kwargs)

    def call(variables, arrays):
        # The first one is called first, and sees quantised layers too.
        with nn.intercept_methods(record), use_quantized():
            apply(variables, arrays)

    jax.eval_shape(call, variables, arrays)
    return layers


def _is_format(argument: Any) -> bool:
    return isinstance(argument, QuantConfig) or (
        isinstance(argument, str) and argument in CODEBOOKS
    )


def by_arrays(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """The function of the arrays in its arguments alone; flags stay what they are."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def of_arrays(first, arrays):
        filled = dict(zip(places, arrays, strict=True))
        args, kwargs = treedef.unflatten(
            [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        )
        return function(first, *args, **kwargs)

    return of_arrays, [leaves[i] for i in places]
