"""quantize_model and back: the layers of a model, in place."""

from collections.abc import Sequence

import jax
from flax import nnx

from jaxbnb.core import QuantConfig
from jaxbnb.core._paths import matches
from jaxbnb.nnx import _surgery
from jaxbnb.nnx._embed import QuantEmbed
from jaxbnb.nnx._linear import QuantLinear

Rule = tuple[str | Sequence[str], QuantConfig | None]


def quantize_model(
    model: nnx.Module,
    config: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
    *,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
) -> list[str]:
    """Replaces the ``nnx.Linear`` layers of ``model`` by `QuantLinear`, in place.

    Stacked layers (kernels with leading axes) are quantised matrix by matrix.
    ``nnx.Embed`` layers become `QuantEmbed` where a rule says so. Everything else stays
    as it is; `summary` shows what.

    Args:
        model: any NNX model, also an abstract one.
        config: format of the kernels and compute dtype.
        rules: ``(layers, config)`` pairs, which go before ``config`` and ``skip``: the
            first one that names a layer decides its format, or with None that it is
            left alone. Layers are named as in ``skip``.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.

    Returns:
        The dotted paths of the layers that were quantised.

    Raises:
        ValueError: no layer was quantised, or a rule names no layer.

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
    linears: list[str] = []
    unused = dict(enumerate(rules))

    def format_of(path: str, default: QuantConfig | None) -> QuantConfig | None:
        for i, (layers, chosen) in enumerate(rules):
            if matches(path, layers):
                unused.pop(i, None)
                return chosen
        return default

    def new(path: str, module: nnx.Module) -> nnx.Module | None:
        if type(module) is nnx.Embed:
            chosen = format_of(path, None)
            return None if chosen is None else QuantEmbed.from_embed(module, chosen)
        if type(module) is not nnx.Linear:
            return None
        linears.append(path)
        chosen = format_of(path, None if matches(path, skip) else config)
        return None if chosen is None else QuantLinear.from_linear(module, chosen)

    replaced = _surgery.replace_modules(model, new)
    if unused:
        raise ValueError(
            f"rules that decide over no layer of {type(model).__name__}: "
            f"{list(unused.values())}; its nnx.Linear layers are {linears}"
        )
    if not replaced:
        raise ValueError(
            f"quantize_model found nothing to quantise in {type(model).__name__}: "
            f"its nnx.Linear layers are {linears}, and skip is {skip!r}"
        )
    return replaced


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
        ValueError: there is no `QuantLinear` and no `QuantEmbed`.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> _ = jaxbnb.nnx.quantize_model(model)
        >>> jaxbnb.nnx.dequantize_model(model), type(model.layers[0]).__name__
        (['layers.0'], 'Linear')
    """

    def new(_: str, module: nnx.Module) -> nnx.Module | None:
        if isinstance(module, QuantLinear):
            return module.to_linear(dtype)
        return module.to_embed(dtype) if isinstance(module, QuantEmbed) else None

    replaced = _surgery.replace_modules(model, new)
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no quantised layers")
    return replaced
