"""Keras's layers with frozen, quantised weights."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxbnb.core import QuantConfig, QuantizedArray, embed, matmul
from jaxbnb.core.config import as_config
from jaxbnb.core.contraction import KernelAxes
from jaxbnb.core.einsum import einsum, einsum_axes
from jaxbnb.core.parts import PARTS
from jaxbnb.keras._backend import keras

# What a layer's group in a file has besides its variables.
_FORMAT: Final = "format"


def _register(layer: type) -> type:
    """Lets Keras's files have a layer, under the name of Keras's own.

    They number layers by the name of their class. So a layer has the same name whether
    it is quantised or not, and `load_weights` finds it.
    """
    registered = keras.saving.register_keras_serializable("jaxbnb", layer.__name__)
    registered(layer).__name__ = layer.__name__.removeprefix("Quant")
    return layer


class Quantized(keras.layers.Layer):
    """What the quantised layers share: their variables, files and configs.

    The parts of a weight are variables that are not trainable. A subclass says in
    `quantize_weights` and `decode_weights` which weights it has.
    """

    def __init__(
        self,
        *args: Any,
        config: QuantConfig | str | Mapping[str, Any] = QuantConfig(),  # noqa: B008
        **kwargs: Any,
    ):
        # First, since Keras may build the layer at once.
        is_fields = isinstance(config, Mapping)
        self.config = QuantConfig.from_dict(config) if is_fields else as_config(config)
        super().__init__(*args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables of Keras's layer, and quantises its weights."""
        if self.built:
            return
        # Keras would add the adapter to a weight that is then replaced.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)
        self.quantize_weights()
        if rank:
            self.enable_lora(rank, lora_alpha=self.lora_alpha)

    def quantize_weights(self) -> None:
        """Replaces the weights by codes and absmax."""
        raise NotImplementedError

    def decode_weights(self, dtype: Any) -> None:
        """Inverts `quantize_weights`."""
        raise NotImplementedError

    def put(self, name: str, q: QuantizedArray) -> None:
        """Puts a weight's parts in variables; the codes get the attribute it had."""
        attribute = _attribute(name)
        parts = {part: getattr(q, part) for part in PARTS}
        with _unlock(self):
            _remove(self, attribute)
            for part, value in parts.items():
                if value is None:
                    continue
                variable = self.add_weight(
                    name=f"{name}_{part}",
                    shape=value.shape,
                    dtype=value.dtype.name,
                    initializer="zeros",
                    trainable=False,
                    autocast=False,
                )
                variable.assign(value)
                is_codes = part == "codes"
                setattr(self, attribute if is_codes else f"{name}_{part}", variable)
        # Without its arrays, which Keras may replace: in fit, they are traced.
        form = dataclasses.replace(q, **dict.fromkeys(PARTS))
        setattr(self, f"{name}_form", form)

    def get(self, name: str) -> QuantizedArray:
        """Returns the weight that `put` has stored."""
        variables = {part: getattr(self, f"{name}_{part}", None) for part in PARTS}
        variables["codes"] = getattr(self, _attribute(name))
        parts = {
            part: None if variable is None else jnp.asarray(variable.value)
            for part, variable in variables.items()
        }
        return dataclasses.replace(getattr(self, f"{name}_form"), **parts)

    def take_out(self, name: str, value: Float[Array, "..."]) -> None:
        """Puts an array in one variable again, and removes the parts of the weight."""
        with _unlock(self):
            for part in PARTS[1:]:
                if hasattr(self, f"{name}_{part}"):
                    _remove(self, f"{name}_{part}")
            delattr(self, f"{name}_form")
            _remove(self, _attribute(name))
            weight = self.add_weight(
                name=name,
                shape=value.shape,
                dtype=value.dtype.name,
                initializer="zeros",
                trainable=not self.lora_enabled,
            )
            weight.assign(value)
            setattr(self, _attribute(name), weight)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `jaxbnb.matmul` that the config has."""
        names = ("compute_dtype", "outlier_threshold", "act_quant_type")
        return {name: getattr(self.config, name) for name in names}

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, as JSON values."""
        return {**super().get_config(), "config": self.config.to_dict()}

    # Not Keras's own: these merge adapters into the weight, which would be rounded.

    def save_own_variables(self, store: Any) -> None:
        """Writes each variable under its name, and the format of the weight."""
        for variable in self._variables():
            store[variable.name] = variable.value
        text = json.dumps(self._format())
        store[_FORMAT] = np.frombuffer(text.encode(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote.

        Raises:
            ValueError: the file has another format, or other variables.
        """
        variables = {variable.name: variable for variable in self._variables()}
        saved, expected = read_format(store), self._format()
        if saved != expected or set(store.keys()) != {*variables, _FORMAT}:
            raise ValueError(
                f"the file has {self.path} as {saved}, with {sorted(store.keys())}, "
                f"and the model has it as {expected}, with {sorted(variables)}; load "
                "the file with jaxbnb.keras.load_weights, into a model that is not "
                "quantised"
            )
        for name, variable in variables.items():
            variable.assign(store[name])

    def _format(self) -> dict[str, Any]:
        alpha = self.lora_alpha if self.lora_enabled else None
        return {"config": self.config.to_dict(), "lora_alpha": alpha}

    def _variables(self) -> list[Any]:
        return [*self._trainable_variables, *self._non_trainable_variables]


@_register
class QuantDense(Quantized, keras.layers.Dense):
    """``keras.layers.Dense`` with a frozen, quantised kernel.

    Args:
        *args: arguments of ``keras.layers.Dense``.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or the
            name of a format.
        **kwargs: arguments of ``keras.layers.Dense``.

    Example:
        >>> import jaxbnb.keras, numpy as np
        >>> layer = jaxbnb.keras.QuantDense(256, config="nf4")
        >>> layer(np.ones((4, 128), np.float32)).shape
        (4, 256)
        >>> [variable.name for variable in layer.trainable_variables]
        ['bias']
    """

    @property
    def kernel(self) -> Float[Array, "fan_in fan_out"]:
        """The decoded kernel, with the update of adapters."""
        kernel = self.get("kernel").dequantize(self.compute_dtype)
        if not self.lora_enabled:
            return kernel
        update = keras.ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
        return kernel + _scale(self, update).astype(kernel.dtype)

    def quantize_weights(self) -> None:
        """Replaces the kernel by codes and absmax."""
        self.put("kernel", self.config.quantize_kernel(self._kernel.value))

    def decode_weights(self, dtype: Any) -> None:
        """Inverts `quantize_weights`."""
        self.take_out("kernel", self.get("kernel").dequantize(dtype))

    def call(
        self, inputs: Float[Array, "*batch fan_in"], training: Any = None
    ) -> Float[Array, "*batch fan_out"]:
        """Applies the layer along the last axis; ``training`` does not matter."""
        y = matmul(jnp.asarray(inputs), self.get("kernel"), **self.options)
        if self.lora_enabled:
            update = keras.ops.matmul(inputs, self.lora_kernel_a)
            update = keras.ops.matmul(update, self.lora_kernel_b)
            y = y + _scale(self, update).astype(y.dtype)
        return _finish(self, y)


@_register
class QuantEinsumDense(Quantized, keras.layers.EinsumDense):
    """``keras.layers.EinsumDense`` with a frozen, quantised kernel.

    The kernel is stored as a matrix: the axes that the product sums over are flattened
    to one, and blocks run along it. Axes that the input and the result also have, as of
    experts, stack such matrices.

    Args:
        *args: arguments of ``keras.layers.EinsumDense``.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or the
            name of a format.
        **kwargs: arguments of ``keras.layers.EinsumDense``.

    Raises:
        ValueError: the equation is not a product with a kernel. The layer raises it
            when it is built.

    Example:
        >>> import jaxbnb.keras, numpy as np
        >>> layer = jaxbnb.keras.QuantEinsumDense(
        ...     "btd,dnh->btnh", output_shape=(None, 4, 16), config="nf4")
        >>> layer(np.ones((2, 5, 64), np.float32)).shape
        (2, 5, 4, 16)
    """

    @property
    def kernel(self) -> Float[Array, "..."]:
        """The decoded kernel, with the update of adapters."""
        matrices = self.get("kernel").dequantize(self.compute_dtype)
        kernel = self.kernel_axes.to_kernel(matrices)
        if not self.lora_enabled:
            return kernel
        update = keras.ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
        return kernel + _scale(self, update).astype(kernel.dtype)

    def quantize_weights(self) -> None:
        """Replaces the kernel by codes and absmax."""
        kernel = self._kernel.value
        self.kernel_axes: KernelAxes = einsum_axes(self.equation, kernel.shape)
        matrices = self.kernel_axes.to_matrices(kernel)
        self.put("kernel", self.config.quantize_kernel(matrices))

    def decode_weights(self, dtype: Any) -> None:
        """Inverts `quantize_weights`."""
        matrices = self.get("kernel").dequantize(dtype)
        self.take_out("kernel", self.kernel_axes.to_kernel(matrices))

    def call(
        self, inputs: Float[Array, "..."], training: Any = None
    ) -> Float[Array, "..."]:
        """Computes the einsum; ``training`` does not matter."""
        y = einsum(
            self.equation,
            jnp.asarray(inputs),
            self.get("kernel"),
            self.kernel_axes,
            **self.options,
        )
        if self.lora_enabled:
            factors = self.lora_kernel_a, self.lora_kernel_b
            update = keras.ops.einsum(_lora_equation(self.equation), inputs, *factors)
            y = y + _scale(self, update).astype(y.dtype)
        return _finish(self, y)


@_register
class QuantEmbedding(Quantized, keras.layers.Embedding):
    """``keras.layers.Embedding`` with frozen, quantised rows.

    Only the rows that are looked up are decoded.

    Args:
        *args: arguments of ``keras.layers.Embedding``.
        config: format of the rows: a `jaxbnb.QuantConfig`, or the name of a format.
        **kwargs: arguments of ``keras.layers.Embedding``.

    Raises:
        NotImplementedError: the layer has an adapter, or is to get one.

    Example:
        >>> import jaxbnb.keras, numpy as np
        >>> layer = jaxbnb.keras.QuantEmbedding(512, 64, config="int8")
        >>> layer(np.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    @property
    def embeddings(self) -> Float[Array, "input_dim output_dim"]:
        """The decoded rows."""
        return self.get("embeddings").dequantize(self.compute_dtype)

    def quantize_weights(self) -> None:
        """Replaces the rows by codes and absmax."""
        if self.lora_enabled:
            raise _no_adapters(self)
        rows = self._embeddings.value
        self.put("embeddings", self.config.quantize_embedding(rows))

    def decode_weights(self, dtype: Any) -> None:
        """Inverts `quantize_weights`."""
        self.take_out("embeddings", self.get("embeddings").dequantize(dtype))

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError."""
        raise _no_adapters(self)

    def call(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch output_dim"]:
        """Looks rows up; like Keras's layer, NaN for an index that is out of range."""
        indices = jnp.asarray(inputs)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            indices = indices.astype(jnp.int32)
        return embed(indices, self.get("embeddings"), dtype=self.compute_dtype)


# Keras's class is first: its `call` handles masks, and gets rows of the next class.
@_register
class QuantReversibleEmbedding(keras.layers.ReversibleEmbedding, QuantEmbedding):
    """``keras.layers.ReversibleEmbedding`` with frozen, quantised rows.

    The reverse projection multiplies by the same codes, or by those of
    ``reverse_embeddings`` if the weights are not tied.

    Args:
        *args: arguments of ``keras.layers.ReversibleEmbedding``.
        config: format of the rows, and compute dtype of the projection: a
            `jaxbnb.QuantConfig`, or the name of a format.
        **kwargs: arguments of ``keras.layers.ReversibleEmbedding``.

    Raises:
        NotImplementedError: the layer has an adapter, or is to get one.

    Example:
        >>> import jaxbnb.keras, numpy as np
        >>> layer = jaxbnb.keras.QuantReversibleEmbedding(512, 64, config="int8")
        >>> rows = layer(np.array([[1, 2, 3]]))
        >>> layer(rows, reverse=True).shape
        (1, 3, 512)
    """

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables of Keras's layer, and quantises its weights."""
        is_built = self.built
        super().build(input_shape)
        if not is_built and not self.tie_weights:
            self._quantize_reverse()

    def quantize_weights(self) -> None:
        """Replaces the rows by codes and absmax."""
        super().quantize_weights()
        # Keras makes the reverse weight after it has built the rows.
        if not self.tie_weights and hasattr(self, "reverse_embeddings"):
            self._quantize_reverse()

    def _quantize_reverse(self) -> None:
        kernel = self.reverse_embeddings.value
        self.put("reverse_embeddings", self.config.quantize_kernel(kernel))

    def decode_weights(self, dtype: Any) -> None:
        """Inverts `quantize_weights`."""
        super().decode_weights(dtype)
        if not self.tie_weights:
            kernel = self.get("reverse_embeddings").dequantize(dtype)
            self.take_out("reverse_embeddings", kernel)

    def call(
        self, inputs: Array, reverse: bool = False
    ) -> Float[Array, "*batch features"]:
        """Looks rows up, or multiplies by each row if ``reverse``."""
        if not reverse:
            return super().call(inputs)
        x = jnp.asarray(inputs)
        if self.reverse_dtype is not None:
            x = x.astype(self.reverse_dtype)
        is_tied = self.tie_weights
        q = self.get("embeddings").mT if is_tied else self.get("reverse_embeddings")
        logits = matmul(x, q, **self.options)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = jnp.tanh(logits / cap) * cap
        return logits


# Exact types only: a subclass may compute something else.
LAYERS: Final[dict[type, type[Quantized]]] = {
    keras.layers.Dense: QuantDense,
    keras.layers.EinsumDense: QuantEinsumDense,
    keras.layers.Embedding: QuantEmbedding,
    keras.layers.ReversibleEmbedding: QuantReversibleEmbedding,
}


def read_format(store: Any) -> dict[str, Any] | None:
    """Reads the format of a layer in a file; None if it is not quantised."""
    if _FORMAT not in store.keys():  # noqa: SIM118 (not a dict)
        return None
    return json.loads(np.asarray(store[_FORMAT]).tobytes())


def change_class(layer: Any, quantized: type[Quantized], config: QuantConfig) -> None:
    """Quantises a layer of Keras's, which becomes ``quantized``.

    Raises:
        ValueError: its equation is not a product with a kernel.
        NotImplementedError: it is an embedding with an adapter.
    """
    old = type(layer)
    layer.__class__ = quantized
    layer.config = config
    try:
        layer.quantize_weights()
    except (ValueError, NotImplementedError):
        layer.__class__ = old
        raise


def _attribute(name: str) -> str:
    """Returns the attribute in which Keras's layer keeps a weight."""
    return name if name == "reverse_embeddings" else f"_{name}"


def _remove(layer: Any, attribute: str) -> None:
    """Removes a variable. Keras's ``delattr`` collects garbage each time, for long."""
    layer._untrack_variable(getattr(layer, attribute))
    object.__delattr__(layer, attribute)


@contextlib.contextmanager
def _unlock(layer: Any) -> Iterator[None]:
    """Lets a layer that is built get and lose variables, as Keras's own layers do."""
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    yield
    if was_locked:
        layer._tracker.lock()


def _finish(layer: Any, y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Adds the bias, and applies the activation."""
    if layer.bias is not None:
        y = keras.ops.add(y, layer.bias)
    return y if layer.activation is None else layer.activation(y)


def _scale(layer: Any, update: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.asarray(update) * (layer.lora_alpha / layer.lora_rank)


def _lora_equation(equation: str) -> str:
    """Returns the product of an input with both factors of a kernel.

    Keras factorises a kernel between its last axis and the others.

    Example:
        >>> _lora_equation("btd,dnh->btnh")
        'btd,dnA,Ah->btnh'
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    inputs, kernel = operands.split(",")
    free = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    rank = next(letter for letter in free if letter not in equation)
    return f"{inputs},{kernel[:-1]}{rank},{rank}{kernel[-1]}->{result}"


def _no_adapters(layer: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{layer.path} is a quantised embedding, which does not take adapters; leave "
        "the embedding as it is, or adapt other layers"
    )
