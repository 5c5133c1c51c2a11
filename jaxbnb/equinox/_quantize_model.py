"""quantize_model and dequantize_model: a new model with other layers."""

from collections.abc import Sequence
from typing import Any, Final

import jax

from jaxbnb.core import QuantConfig
from jaxbnb.core.rules import FORM, Report, Rule, check_rules, choose_formats
from jaxbnb.core.tree import path_of
from jaxbnb.equinox._layers import QuantEmbedding, QuantLinear, eqx

# Exact types only: a subclass may compute something else.
_LAYERS: Final = {eqx.nn.Linear: QuantLinear, eqx.nn.Embedding: QuantEmbedding}


def quantize_model(
    model: Any,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
) -> Any:
    """Returns an Equinox model with quantised linear layers; ``model`` stays as it is.

    ``eqx.nn.Linear`` becomes `QuantLinear`, also inside ``eqx.nn.MultiheadAttention``.
    ``eqx.nn.Embedding`` becomes `QuantEmbedding`, but only if a rule says so. Stacked
    layers, as from ``eqx.filter_vmap``, are quantised one by one. All else stays as it
    is, such as convolutions, recurrent cells and subclasses of these layers; `report`
    lists the large weights among them.

    ``eqx.nn.Shared`` keeps what it ties: a quantised layer that it reads gives its
    quantised weight to the others. A layer that gets its weight from another one does
    not have any of its own, and stays as it is.

    Args:
        model: any Equinox model, which may be abstract (``eqx.filter_eval_shape``).
        config: format of the weights and compute dtype: a `jaxbnb.QuantConfig`, or the
            name of a format.
        rules: ``(layers, config)`` pairs, which come before ``config`` and ``skip``.
            The first one that names a layer decides its format; None leaves the layer
            alone. Layers are named as in ``skip``.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.

    Raises:
        TypeError: ``model`` is not of Equinox, ``rules`` are not pairs, or a format is
            neither a config nor a name.
        ValueError: no layer was quantised, all are quantised already, a rule does not
            decide any layer, or the weight of a layer also occurs elsewhere in the
            model. Equinox treats it as two arrays; ``eqx.nn.Shared`` makes it one.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> model = eqx.nn.MLP(64, 64, 256, depth=2, key=jax.random.key(0))
        >>> model = jaxbnb.equinox.quantize_model(
        ...     model, "nf4", rules=[(["layers.2"], "int8")])
        >>> jaxbnb.equinox.report(model)
        ['layers.0', 'layers.1', 'layers.2']
        >>> model.layers[2].weight.quant_type
        'int8'
    """
    check_rules(rules, FORM)
    found = _find_layers(model)
    if not any(map(_is_module, jax.tree.leaves(model, is_leaf=_is_module))):
        raise TypeError(
            "quantize_model takes a tree of Equinox modules, got "
            f"{type(model).__name__}; for a tree of arrays, use jaxbnb.quantize_tree"
        )
    quantized = {
        path: layer.config.quant_type
        for path, layer in found.items()
        if isinstance(layer, QuantLinear | QuantEmbedding)
    }
    layers = {
        path: layer
        for path, layer in found.items()
        # eqx.nn.Shared has put a placeholder in place of some weights.
        if path not in quantized and hasattr(layer.weight, "dtype")
    }
    formats = choose_formats(
        {path: type(layer) is eqx.nn.Embedding for path, layer in layers.items()},
        config,
        rules,
        skip,
        type(model).__name__,
        quantized,
    )
    _check_unshared(model, {path: layers[path] for path in formats})

    def replace(path: Any, layer: Any) -> Any:
        name = path_of(path)
        if name not in formats:
            return layer
        try:
            return _LAYERS[type(layer)](layer, formats[name])
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{name}: {error}") from error

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=_is_layer)


def dequantize_model(model: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Returns a model with Equinox's layers in place of quantised ones.

    Args:
        model: any Equinox model.
        dtype: dtype of the decoded weights; None for the dtype that was quantised.
            Biases keep theirs.

    Raises:
        ValueError: the model does not have quantised layers.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> model = eqx.nn.MLP(64, 64, 64, depth=1, key=jax.random.key(0))
        >>> model = jaxbnb.equinox.quantize_model(model, "nf4")
        >>> type(jaxbnb.equinox.dequantize_model(model).layers[0]).__name__
        'Linear'
    """
    if not report(model):
        raise ValueError(f"{type(model).__name__} does not have quantised layers")

    def replace(layer: Any) -> Any:
        if isinstance(layer, QuantLinear):
            return layer.to_linear(dtype)
        return layer.to_embedding(dtype) if isinstance(layer, QuantEmbedding) else layer

    return jax.tree.map(replace, model, is_leaf=_is_layer)


def report(model: Any) -> Report:
    """Lists a model's quantised layers, and the large weights that are not quantised.

    Returns:
        The dotted paths of the quantised layers, in a list. Its attribute
        ``left_alone`` has the shapes of the large weights that are not.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> keys = jax.random.split(jax.random.key(0))
        >>> model = {"linear": eqx.nn.Linear(64, 64, key=keys[0]),
        ...          "conv": eqx.nn.Conv1d(64, 64, 3, key=keys[1])}
        >>> found = jaxbnb.equinox.report(jaxbnb.equinox.quantize_model(model))
        >>> found, found.left_alone
        (['linear'], {'conv.weight': (64, 64, 3)})
    """
    layers = [
        path
        for path, layer in _find_layers(model).items()
        if isinstance(layer, QuantLinear | QuantEmbedding)
    ]
    weights = {
        path_of(path): leaf
        for path, leaf in jax.tree.leaves_with_path(model)
        if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    }
    return Report(layers, weights)


def _is_module(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _is_layer(node: Any) -> bool:
    return type(node) in _LAYERS or isinstance(node, QuantLinear | QuantEmbedding)


def _find_layers(model: Any) -> dict[str, Any]:
    found = jax.tree.leaves_with_path(model, is_leaf=_is_layer)
    return {path_of(path): node for path, node in found if _is_layer(node)}


def _check_unshared(model: Any, layers: dict[str, Any]) -> None:
    places: dict[int, list[str]] = {}
    for path, leaf in jax.tree.leaves_with_path(model):
        places.setdefault(id(leaf), []).append(path_of(path))
    for path, layer in layers.items():
        same = places[id(layer.weight)]
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(same)} are the same array. Equinox takes them for "
                "separate ones, and not all would be quantised. Tie them with "
                f"eqx.nn.Shared, or name {path} in skip"
            )
