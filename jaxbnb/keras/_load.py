"""load_model and load_weights: Keras's files with quantised layers in them."""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any, Final

from jaxbnb.core import QuantConfig
from jaxbnb.keras._backend import keras
from jaxbnb.keras._layers import LAYERS, Quantized, change_class, read_format
from jaxbnb.keras._quantize_model import check_model, forget_compiled

_WEIGHTS: Final = "model.weights.h5"


def load_weights(model: Any, path: str | os.PathLike[str]) -> list[str]:
    """Loads Keras's ``.weights.h5``, and quantises the layers that the file quantises.

    The file says which layers are quantised, in which formats, and with which adapters.
    So ``model`` does not have to be, and nothing is rounded again. The layers of a
    model that is quantised must have the formats and adapters of the file.

    Args:
        model: a Keras model that is built, of the shape of the saved one.
        path: file of ``model.save_weights``.

    Returns:
        The dotted paths of the layers that are quantised now.

    Raises:
        TypeError: ``model`` is not of Keras.
        ValueError: the file has other layers, variables or formats, or the optimizer
            has a state already.

    Example:
        >>> import jaxbnb.keras, keras, pathlib, tempfile
        >>> def make():
        ...     layers = [keras.Input((64,)), keras.layers.Dense(64, name="linear")]
        ...     return keras.Sequential(layers, name="model")
        >>> model, path = make(), pathlib.Path(tempfile.mkdtemp()) / "m.weights.h5"
        >>> _ = jaxbnb.keras.quantize_model(model, "nf4")
        >>> model.save_weights(path)
        >>> jaxbnb.keras.load_weights(make(), path)
        ['model.linear']
    """
    check_model(model, "load_weights")
    layers = list(model._flatten_layers())
    for layer in layers:
        if type(layer) in LAYERS:
            layer.__class__ = _WAITING[type(layer)]
    try:
        model.load_weights(path)
    finally:
        # Those that the file did not reach.
        for layer in layers:
            layer.__class__ = _KERAS.get(type(layer), type(layer))
        forget_compiled(model)
    return [
        (layer.path or layer.name).replace("/", ".")
        for layer in layers
        if isinstance(layer, Quantized)
    ]


def load_model(
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    *,
    safe_mode: bool = True,
) -> Any:
    """Loads a ``.keras`` file with quantised layers.

    ``keras.saving.load_model`` does it too, unless layers that are quantised are inside
    others, such as ``MultiHeadAttention`` or the models of KerasHub: Keras makes those
    again without knowing that they are quantised.

    Args:
        path: file of ``model.save``.
        custom_objects: classes by name, as for Keras.
        safe_mode: whether to refuse to run code from the file, as for Keras.

    Returns:
        The model, which is not compiled.

    Raises:
        ValueError: the file is not one of Keras's models.
        NotImplementedError: the file has assets, such as the vocabulary of a tokenizer.
            Load them with the model's class, and the weights with `load_weights`.

    Example:
        >>> import jaxbnb.keras, keras, pathlib, tempfile
        >>> x = keras.Input((8, 64))
        >>> y = keras.layers.MultiHeadAttention(4, 16, name="attention")(x, x)
        >>> model = keras.Model(x, y)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "m.keras"
        >>> _ = jaxbnb.keras.quantize_model(model, "nf4")
        >>> model.save(path)
        >>> loaded = jaxbnb.keras.load_model(path)
        >>> type(loaded.get_layer("attention").query_dense).__qualname__
        'QuantEinsumDense'
    """
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        config = json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a .keras file: {error}") from error
    with archive, tempfile.TemporaryDirectory() as folder:
        assets = [name for name in names if name.startswith("assets/")]
        if assets or _WEIGHTS not in names:
            raise NotImplementedError(
                f"{path} has {', '.join(names)}, and load_model reads config.json and "
                f"{_WEIGHTS} only. Make the model with its own class, and load its "
                "weights with jaxbnb.keras.load_weights"
            )
        # Its optimizer would get a state for variables that are then replaced.
        config.pop("compile_config", None)
        model = keras.saving.deserialize_keras_object(
            config, custom_objects, safe_mode=safe_mode
        )
        load_weights(model, archive.extract(_WEIGHTS, folder))
    return model


def _make_waiting(layer: type, quantized: type[Quantized]) -> type:
    """Makes a class of layers that are quantised if the file that they load is."""

    def load_own_variables(self: Any, store: Any) -> None:
        self.__class__ = layer
        form = read_format(store)
        if form is not None:
            change_class(self, quantized, QuantConfig.from_dict(form["config"]))
            if form["lora_alpha"] is not None:
                rank = store["lora_kernel_a"].shape[-1]
                self.enable_lora(rank, lora_alpha=form["lora_alpha"])
        self.load_own_variables(store)

    # Keras numbers layers by the names of their classes.
    return type(layer.__name__, (layer,), {"load_own_variables": load_own_variables})


_WAITING: Final = {
    layer: _make_waiting(layer, quantized) for layer, quantized in LAYERS.items()
}
_KERAS: Final = {waiting: layer for layer, waiting in _WAITING.items()}
