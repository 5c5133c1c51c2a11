"""quantize_model, dequantize_model and add_adapters: layers that change in place."""

from collections.abc import Sequence
from typing import Any, Final

import jax

from jaxbnb.core import QuantConfig
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import FORM, Report, Rule, check_rules, choose_formats
from jaxbnb.keras._backend import keras
from jaxbnb.keras._layers import (
    LAYERS,
    QuantDense,
    QuantEinsumDense,
    Quantized,
    change_class,
)

_KERAS_LAYERS: Final = {quantized: layer for layer, quantized in LAYERS.items()}
_LINEARS: Final = (QuantDense, QuantEinsumDense)


def quantize_model(
    model: Any,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head", "logits"),
) -> Report:
    """Quantises the linear layers of a Keras model, in place.

    ``Dense`` becomes `QuantDense` and ``EinsumDense`` `QuantEinsumDense`, wherever they
    are in the model, also inside Keras's attention. ``Embedding`` and
    ``ReversibleEmbedding`` become `QuantEmbedding` and `QuantReversibleEmbedding`, but
    only if a rule says so. All else stays as it is, including subclasses of these
    layers; the report lists the large weights among them.

    The layers stay the same objects and change their class, as models refer to them in
    many places. One layer at a time is quantised. Quantise before ``compile``.

    Args:
        model: a Keras model or layer that is built.
        config: format of the weights and compute dtype: a `jaxbnb.QuantConfig`, or the
            name of a format.
        rules: ``(layers, config)`` pairs, which come before ``config`` and ``skip``.
            The first one that names a layer decides its format; None leaves the layer
            alone. Layers are named as in ``skip``.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. A path is ``layer.path`` with
            dots. Output heads by default.

    Returns:
        The dotted paths of the layers that were quantised, in a list. Its attribute
        ``left_alone`` has the shapes of the large weights that were not.

    Raises:
        TypeError: ``model`` is not of Keras, ``rules`` are not pairs, or a format is
            neither a config nor a name.
        ValueError: no layer was quantised, all are quantised already, a rule does not
            decide any layer, a layer is not built or is quantised by Keras, an einsum
            is not a product of matrices, or the optimizer has a state already.
        NotImplementedError: an embedding has an adapter.

    Example:
        >>> import jaxbnb.keras, keras
        >>> model = keras.Sequential([
        ...     keras.Input((64,)),
        ...     keras.layers.Dense(256, activation="relu", name="up"),
        ...     keras.layers.Dense(64, name="down")], name="model")
        >>> jaxbnb.keras.quantize_model(model, "nf4", rules=[(["down"], "int8")])
        ['model.up', 'model.down']
        >>> model.get_layer("up").config.quant_type
        'nf4'
    """
    check_model(model, "quantize_model")
    check_rules(rules, FORM)
    found = _find_layers(model)
    formats = choose_formats(
        {
            path: isinstance(layers[0], keras.layers.Embedding)
            for path, layers in found.items()
            if type(layers[0]) in LAYERS
        },
        config,
        rules,
        skip,
        type(model).__name__,
        {
            path: layers[0].config.quant_type
            for path, layers in found.items()
            if isinstance(layers[0], Quantized)
        },
    )
    chosen = [(path, layer) for path in formats for layer in found[path]]
    for path, layer in chosen:
        _check_layer(path, layer)
    for path, layer in chosen:
        try:
            change_class(layer, LAYERS[type(layer)], formats[path])
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error
    forget_compiled(model)
    return Report(formats, _list_weights(model))


def dequantize_model(
    model: Any, dtype: jax.typing.DTypeLike | None = None
) -> list[str]:
    """Gives a model Keras's layers back, in place, with decoded weights.

    Args:
        model: a Keras model or layer.
        dtype: dtype of the decoded weights; None for the dtype that was quantised.
            Biases keep theirs, and adapters stay.

    Returns:
        The dotted paths of the layers that were decoded.

    Raises:
        TypeError: ``model`` is not of Keras.
        ValueError: the model does not have quantised layers, or its optimizer has a
            state already.

    Example:
        >>> import jaxbnb.keras, keras
        >>> layers = [keras.Input((64,)), keras.layers.Dense(64, name="linear")]
        >>> model = keras.Sequential(layers, name="model")
        >>> _ = jaxbnb.keras.quantize_model(model, "nf4")
        >>> jaxbnb.keras.dequantize_model(model), type(model.layers[0]).__name__
        (['model.linear'], 'Dense')
    """
    check_model(model, "dequantize_model")
    found = _find_quantized(model)
    if not found:
        raise ValueError(f"{type(model).__name__} does not have quantised layers")
    for _, layer in found:
        layer.decode_weights(dtype)
        del layer.config
        layer.__class__ = _KERAS_LAYERS[type(layer)]
    forget_compiled(model)
    return list(dict(found))


def add_adapters(
    model: Any,
    r: int = 8,
    *,
    alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> list[str]:
    """Gives quantised linear layers Keras's LoRA, and freezes everything else.

    It calls ``layer.enable_lora``, so the factors are ``lora_kernel_a`` and
    ``lora_kernel_b``, and files of Keras and KerasHub have them. The model computes the
    same at first.

    Args:
        model: a Keras model with quantised layers.
        r: rank of the updates.
        alpha: numerator of their scale ``alpha / r``; None for ``r``.
        target_modules: layers to adapt: names, each a whole dotted path or its last
            parts, or one regular expression for whole paths. None for all quantised
            linear layers.

    Returns:
        The dotted paths of the layers that have adapters now.

    Raises:
        TypeError: ``model`` is not of Keras.
        ValueError: ``r`` is not positive, no layer is selected, one has an adapter
            already, or the optimizer has a state already.

    Example:
        >>> import jaxbnb.keras, keras
        >>> layers = [keras.Input((64,)), keras.layers.Dense(64, name="linear")]
        >>> model = keras.Sequential(layers, name="model")
        >>> _ = jaxbnb.keras.quantize_model(model, "nf4")
        >>> jaxbnb.keras.add_adapters(model, r=4)
        ['model.linear']
        >>> [variable.name for variable in model.trainable_variables]
        ['lora_kernel_a', 'lora_kernel_b']

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    check_model(model, "add_adapters")
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be a positive int, got {r!r}")
    found = [
        (p, layer) for p, layer in _find_quantized(model) if type(layer) in _LINEARS
    ]
    chosen = [
        (path, layer)
        for path, layer in found
        if target_modules is None or matches(path, target_modules)
    ]
    if not chosen:
        raise ValueError(
            f"target_modules={target_modules!r} selects no quantised linear layer; "
            f"{type(model).__name__} has {', '.join(dict(found)) or 'none'}"
        )
    adapted = [path for path, layer in chosen if layer.lora_enabled]
    if adapted:
        raise ValueError(f"layers have adapters already: {', '.join(adapted)}")
    for variable in model.trainable_variables:
        variable.trainable = False
    for _, layer in chosen:
        layer.enable_lora(r, lora_alpha=alpha)
    forget_compiled(model)
    return list(dict(chosen))


def check_model(model: Any, function: str) -> None:
    """Raises an error unless ``model`` is of Keras, and not in training."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"{function} takes a Keras model, got {type(model).__name__}; for a tree "
            "of arrays, use jaxbnb.quantize_tree"
        )
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        raise ValueError(
            f"the optimizer of {model.name} has a state for the variables that "
            f"{function} would replace. Set model.optimizer = None to drop it, call "
            f"{function}, and then model.compile"
        )


def _check_layer(path: str, layer: Any) -> None:
    if layer.quantization_mode is not None:
        raise ValueError(
            f"{path} is quantised by Keras, to {layer.quantization_mode}; name it in "
            "skip, or load the model again"
        )
    if not layer.built:
        raise ValueError(
            f"{path} is not built, so it has no weight yet: call the model on a batch, "
            "or model.build(input_shape)"
        )


def _find_layers(model: Any) -> dict[str, list[Any]]:
    """Returns the layers that are or can be quantised, by dotted path."""
    found: dict[str, list[Any]] = {}
    for layer in model._flatten_layers():
        if type(layer) in LAYERS or isinstance(layer, Quantized):
            path = (layer.path or layer.name).replace("/", ".")
            # Layers in different parts of a model may have the same path.
            found.setdefault(path, []).append(layer)
    return found


def _find_quantized(model: Any) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layers in _find_layers(model).items()
        for layer in layers
        if isinstance(layer, Quantized)
    ]


def _list_weights(model: Any) -> dict[str, Any]:
    """Returns the weights that are not quantised, by dotted path."""
    parts = {
        id(variable)
        for _, layer in _find_quantized(model)
        for variable in layer.non_trainable_variables
    }
    return {
        variable.path.replace("/", "."): jax.ShapeDtypeStruct(
            variable.shape, variable.dtype
        )
        for variable in model.variables
        if id(variable) not in parts and variable.dtype.startswith(("float", "bfloat"))
    }


def forget_compiled(model: Any) -> None:
    """Makes Keras trace its functions again, as ``keras.Model.quantize`` does."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model):
            layer.train_function = None
            layer.test_function = None
            layer.predict_function = None
