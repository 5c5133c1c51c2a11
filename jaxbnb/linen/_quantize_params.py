"""quantize_params and dequantize_params: the variables of an unchanged Linen model."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.flax_layers import refuse_custom_product
from jaxbnb.core.formats import CODEBOOKS
from jaxbnb.core.rules import FORM, Report, Rule, check_rules, choose_formats
from jaxbnb.linen.boxes import dequantize_boxed, quantize_boxed, take_out
from jaxbnb.linen.calls import Tree, check_linen, trace_layers


def quantize_params(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
    **kwargs: Any,
) -> tuple[dict[str, Any], Report]:
    """Quantises the kernels of a Linen model's linear layers, in its variables.

    The model stays as it is, and runs on them inside `use_quantized`. One call,
    ``model.apply(variables, *args, **kwargs)``, is traced to find which arrays are
    kernels and which of their axes products sum over; nothing is computed. A kernel is
    stored as a matrix: the axes that are summed over are flattened to one, and blocks
    run along it. Layers stacked by ``nn.scan`` or ``nn.vmap`` along axis 0 are
    quantised one by one.

    Quantised kernels stay in the collection ``"params"``, so that transforms carry them
    as before. They are frozen, and ``jax.grad`` refuses their codes: take them apart
    with `split_quantized` to train the rest. If a kernel is in a box, such as
    ``nn.Partitioned``, its codes and absmax each get one. Their axes have the names of
    the kernel's axes, in the order in which they are stored.

    Args:
        model: Linen module, unbound.
        variables: variables of the model, or their shapes from
            ``jax.eval_shape(model.init, ...)``; the result is then abstract too.
        *args: inputs of the call; arrays may be ``jax.ShapeDtypeStruct``.
        config: format of the kernels, or its name. Give its ``compute_dtype``,
            ``outlier_threshold`` and ``act_quant_type`` to `use_quantized`.
        rules: ``(layers, config)`` pairs, which come before ``config`` and ``skip``.
            The first one that names a layer decides its format; None leaves the layer
            alone. An ``nn.Embed`` is quantised only if a rule says so.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.
        **kwargs: keyword arguments of the call and of ``apply``: ``method``, ``rngs``,
            ``mutable``.

    Returns:
        ``(variables, report)``. The report is a list of the dotted paths of the layers
        that were quantised. Its attribute ``left_alone`` has the shapes of the large
        parameters that were not, including those of layers that the call did not reach.

    Raises:
        TypeError: ``model`` is not a Linen module, or ``rules`` are not pairs.
        ValueError: no layer was quantised, all are quantised already, or a rule does
            not decide any layer; or a layer is stacked along another axis than the
            first, multiplies by one kernel in two ways, or is an ``nn.Einsum`` that is
            not a product of matrices.
        NotImplementedError: a layer has a custom ``dot_general``.

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
        layers = trace_layers(model, variables, args, kwargs)
    except TypeError as error:
        # The error of the model's call would only count arguments.
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
            refuse_custom_product(layer.module)
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
    """Decodes every quantised weight, to the shape that it has in the model.

    Args:
        model: Linen module, as in `quantize_params`.
        variables: variables that `quantize_params` returned.
        *args: inputs of a call, which is traced to find the shapes.
        dtype: dtype of the decoded weights; None for the dtype that was quantised.
        **kwargs: keyword arguments of the call and of ``apply``.

    Raises:
        TypeError: ``model`` is not a Linen module.
        ValueError: no weight is quantised, or the call does not reach its layer.

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
        for layer in trace_layers(model, variables, args, kwargs).values()
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
    """Separates the parameters that are trained from the quantised, frozen ones.

    Args:
        params: collection ``"params"`` from `quantize_params`.

    Returns:
        ``(trained, quantized)``, two nested dictionaries; `merge_quantized` is the
        inverse. They look like the collections ``"params"`` and ``"quantized"`` of a
        model of `jaxbnb.QuantDense` layers.

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
    """Merges the parameters that `split_quantized` separated.

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


def _flatten(variables: Tree, collection: str = "params") -> dict[tuple[str, ...], Any]:
    tree: Any = variables.get(collection, {})
    return flatten_dict(unfreeze(tree))


def _is_format(argument: Any) -> bool:
    return isinstance(argument, QuantConfig) or (
        isinstance(argument, str) and argument in CODEBOOKS
    )
