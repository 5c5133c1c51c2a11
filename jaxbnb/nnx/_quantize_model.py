"""quantize_model and dequantize_model: replace the layers of a model in place."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jaxbnb.core import QuantConfig
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import FORM, Report, Rule, check_rules, choose_formats
from jaxbnb.nnx import surgery
from jaxbnb.nnx._embed import QuantEmbed
from jaxbnb.nnx._general import QuantEinsum, QuantLinearGeneral
from jaxbnb.nnx._linear import QuantLinear
from jaxbnb.nnx._param import DecodedParam, QuantParam, decode_param, quantize_kernel
from jaxbnb.sharding.axis_types import change_in_place


def _quantize_param(param: nnx.Param, config: QuantConfig) -> QuantParam:
    return quantize_kernel(param, config, kind=DecodedParam)


# Exact types only: a subclass may compute something else.
_LAYERS = {
    nnx.Linear: QuantLinear.from_linear,
    nnx.LinearGeneral: QuantLinearGeneral.from_linear_general,
    nnx.Einsum: QuantEinsum.from_einsum,
    nnx.Embed: QuantEmbed.from_embed,
}
_QUANTIZED = (QuantLinear, QuantLinearGeneral, QuantEinsum, QuantEmbed)
_QUANTIZERS = {**_LAYERS, nnx.Param: _quantize_param}


def quantize_model(
    model: nnx.Module,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
) -> Report:
    """Replaces the linear layers of ``model`` by quantised ones, in place.

    ``nnx.Linear`` becomes `QuantLinear`, ``nnx.LinearGeneral`` `QuantLinearGeneral` and
    ``nnx.Einsum`` `QuantEinsum`. ``nnx.Embed`` becomes `QuantEmbed`, but only if a rule
    says so, because it may be a tied head. Stacked layers (kernels with leading axes)
    are quantised kernel by kernel. All else stays as it is, including subclasses of
    these layers. The report lists the large weights among them, and `summary` all.

    A module may also multiply by an ``nnx.Param`` directly, e.g. by one of experts. It
    is quantised if a rule lists its name: along axis -2, as a stack of kernels
    ``(..., in, out)``. Reading it decodes it, to the dtype that it had. This saves
    only the memory of the weights: JAX computes the product, and its backward pass
    keeps the decoded array, except inside ``nnx.remat``.

    Args:
        model: any NNX model, which may be abstract.
        config: format of the kernels and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        rules: ``(layers, config)`` pairs, which come before ``config`` and ``skip``.
            The first one that names a layer decides its format; None leaves the layer
            alone. Layers are named as in ``skip``. An ``nnx.Param`` needs a name in a
            list: a regular expression selects only layers.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.

    Returns:
        The dotted paths of the layers and parameters that were quantised, in a list.
        Its attribute ``left_alone`` has the shapes of the large weights that were not.

    Raises:
        TypeError: ``model`` is not an ``nnx.Module``, or ``rules`` are not pairs.
        ValueError: no layer was quantised, all are quantised already, a rule does not
            decide any layer, an ``nnx.Einsum`` is not a product of matrices, or an
            ``nnx.Param`` would be ``llm_int8``, which is a product.
        NotImplementedError: a layer has a custom ``dot_general`` or ``einsum_op``.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Dict(embed=nnx.Embed(32, 64, rngs=nnx.Rngs(0)),
        ...                  up=nnx.Linear(64, 256, rngs=nnx.Rngs(1)),
        ...                  down=nnx.Linear(256, 64, rngs=nnx.Rngs(2)))
        >>> int8 = jaxbnb.QuantConfig("int8")
        >>> jaxbnb.nnx.quantize_model(
        ...     model, jaxbnb.QuantConfig("nf4"), rules=[(["embed", "down"], int8)])
        ['down', 'embed', 'up']
        >>> model["down"].kernel.quant_type, model["up"].kernel.quant_type
        ('int8', 'nf4')
    """
    surgery.check_model(model, "quantize_model")
    check_rules(rules, FORM)
    if type(model) in _LAYERS:
        raise ValueError(
            f"a {type(model).__name__} is replaced inside a model, and here it is the "
            f"whole model; use jaxbnb.nnx.{_LAYERS[type(model)].__qualname__}"
        )
    layers: dict[str, nnx.Module] = {}
    quantized: dict[str, str] = {}
    lists = [names for names, _ in rules if not isinstance(names, str)]
    for path, parent, _, module in surgery.iter_children(model):
        # A module that occurs twice is one layer, under its first path.
        is_new = not any(module is other for other in layers.values())
        is_named = (
            type(module) is nnx.Param
            and type(parent) not in _LAYERS
            and module.ndim >= 2
            and any(matches(path, names) for names in lists)
        )
        if (type(module) in _LAYERS or is_named) and is_new:
            layers[path] = module
        if isinstance(module, _QUANTIZED):
            quantized[path] = module.config.quant_type
        elif isinstance(module, DecodedParam):
            quantized[path] = module.get_raw_value().quant_type
    if isinstance(model, _QUANTIZED):
        quantized["model"] = model.config.quant_type
    only_by_rule = (nnx.Embed, nnx.Param)
    formats = choose_formats(
        {path: type(module) in only_by_rule for path, module in layers.items()},
        config,
        rules,
        skip,
        type(model).__name__,
        quantized,
    )

    for path, chosen in formats.items():
        if type(layers[path]) is nnx.Param and chosen.quant_type == "llm_int8":
            raise ValueError(
                f"{path} is an nnx.Param, which is decoded where it is used, and "
                "llm_int8 is a product; give it another format, e.g. int8"
            )

    def new(path: str, module: Any) -> Any:
        if path not in formats or layers[path] is not module:
            return None
        try:
            return _QUANTIZERS[type(module)](module, formats[path])
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error

    with change_in_place(model):
        replaced = surgery.replace_modules(model, new)
    weights = {
        path: value
        for path, (variable, value) in surgery.collect_values(model).items()
        if not isinstance(variable, QuantParam)
    }
    return Report(replaced, weights)


def dequantize_model(
    model: nnx.Module, dtype: jax.typing.DTypeLike | None = None
) -> list[str]:
    """Replaces the quantised layers of ``model`` by Flax's, in place.

    Args:
        model: any NNX model.
        dtype: dtype of the decoded weights; None for the dtype that was quantised.
            Biases keep theirs.

    Returns:
        The dotted paths of the layers that were decoded.

    Raises:
        TypeError: ``model`` is not an ``nnx.Module``.
        ValueError: the model has no quantised layers.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> _ = jaxbnb.nnx.quantize_model(model)
        >>> jaxbnb.nnx.dequantize_model(model), type(model.layers[0]).__name__
        (['layers.0'], 'Linear')
    """
    surgery.check_model(model, "dequantize_model")

    def new(_: str, module: Any) -> Any:
        if isinstance(module, QuantLinear):
            return module.to_linear(dtype)
        if isinstance(module, QuantLinearGeneral):
            return module.to_linear_general(dtype)
        if isinstance(module, QuantEinsum):
            return module.to_einsum(dtype)
        if isinstance(module, DecodedParam):
            return decode_param(module, dtype)
        return module.to_embed(dtype) if isinstance(module, QuantEmbed) else None

    with change_in_place(model):
        replaced = surgery.replace_modules(model, new)
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no quantised layers")
    return replaced
