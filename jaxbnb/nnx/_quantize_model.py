"""quantize_model and back: the layers of a model, in place."""

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
from jaxbnb.nnx._param import DecodedParam, QuantParam, decoded, quant_kernel


def _quantize_param(param: nnx.Param, config: QuantConfig) -> QuantParam:
    return quant_kernel(param, config, kind=DecodedParam)


# By the type itself: what inherits from one may compute otherwise.
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
    ``nnx.Einsum`` `QuantEinsum`; ``nnx.Embed`` becomes `QuantEmbed`, but only where a
    rule says so, as it may be a tied head. Stacked layers (kernels with leading axes)
    are quantised kernel by kernel. Everything else stays as it is, also layers that
    inherit from these: the report lists what is large, and `summary` shows all.

    An ``nnx.Param`` that a module multiplies by on its own, e.g. of experts, is
    quantised where a rule lists its name: along axis -2, as a stack of kernels
    ``(..., in, out)``. Whoever reads it gets it decoded, in the dtype that it had. That
    saves the memory of the weights alone: the product is JAX's own, whose backward pass
    keeps the decoded array, unless the block is in ``nnx.remat``.

    Args:
        model: any NNX model, also an abstract one.
        config: format of the kernels and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        rules: ``(layers, config)`` pairs, which go before ``config`` and ``skip``: the
            first one that names a layer decides its format, or with None that it is
            left alone. Layers are named as in ``skip``; an ``nnx.Param`` by a name in a
            list, not by a regular expression, which is for layers.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.

    Returns:
        The dotted paths of the layers that were quantised, and of parameters, as a
        list whose ``left_alone`` has the shapes of the large weights that were not.

    Raises:
        TypeError: ``model`` is not an ``nnx.Module``, or ``rules`` are not pairs.
        ValueError: no layer was quantised, or all are already, or a rule decides over
            no layer, or an ``nnx.Einsum`` is not a product of matrices; or an
            ``nnx.Param`` is to be ``llm_int8``, which is a product.
        NotImplementedError: a layer has a ``dot_general`` or ``einsum_op`` of its own.

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
    for path, parent, _, module in surgery.children(model):
        # A module that is held twice is one layer, under its first path.
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

    replaced = surgery.replace_modules(model, new)
    weights = {
        path: value
        for path, (variable, value) in surgery.values(model).items()
        if not isinstance(variable, QuantParam)
    }
    return Report(replaced, weights)


def dequantize_model(
    model: nnx.Module, dtype: jax.typing.DTypeLike | None = None
) -> list[str]:
    """Replaces the quantised layers of ``model`` by Flax's own, in place.

    Args:
        model: any NNX model.
        dtype: of the decoded weights; None for what was quantised. Biases keep theirs.

    Returns:
        The dotted paths of the layers that were decoded.

    Raises:
        TypeError: ``model`` is not an ``nnx.Module``.
        ValueError: there is no quantised layer.

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
            return decoded(module, dtype)
        return module.to_embed(dtype) if isinstance(module, QuantEmbed) else None

    replaced = surgery.replace_modules(model, new)
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no quantised layers")
    return replaced
