"""LoraLinear: a frozen linear layer and its adapters."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.lora import _init
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._order import gradients_together
from jaxbnb.nnx import QuantLinear

DEFAULT = "default"


class LoraScale(nnx.Variable[jax.Array]):
    """What an update is multiplied by: one number a layer, not trained."""


class AdapterIndex(nnx.Variable[jax.Array]):
    """Which adapter each row of a batch goes through; see `adapter_rows`."""


class LoraAdapter(nnx.Module):
    """One adapter of one linear layer, or of a stack of them.

    Attributes:
        lora_a: ``nnx.LoRAParam`` of shape ``(*stack, in_features, r)``.
        lora_b: ``nnx.LoRAParam`` of shape ``(*stack, r, out_features)``.
        magnitude: of DoRA, ``nnx.LoRAParam`` of shape ``(*stack, out_features)``; or
            None.
        scale: `LoraScale` of shape ``stack``.
        dropout: ``nnx.Dropout``, or None; ``model.train()`` and ``model.eval()`` switch
            it.
        config: the `LoraConfig`.
        ranks: of each layer of the stack; 0 for those without an adapter.
    """

    def __init__(
        self,
        lora_a: Float[Array, "*stack in_features r"],
        lora_b: Float[Array, "*stack r out_features"],
        scale: Float32[Array, "*stack"],
        *,
        magnitude: Float32[Array, "*stack out_features"] | None,
        config: LoraConfig,
        ranks: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scale = LoraScale(scale)
        self.magnitude: nnx.LoRAParam | None = nnx.data(None)
        if magnitude is not None:
            self.magnitude = nnx.LoRAParam(magnitude)
        self.dropout: nnx.Dropout | None = nnx.data(None)
        if config.lora_dropout:
            self.dropout = nnx.Dropout(config.lora_dropout)
            # A stream for each layer of a stack, to be scanned over with the rest.
            # Dropout's own initializer would fork it once more, which it cannot.
            stream = rngs.dropout.fork()
            self.dropout.rngs = nnx.data(
                stream.split(scale.shape) if scale.ndim else stream
            )
        self.config = config
        self.ranks = ranks

    def update(
        self,
        x: Float[Array, "*batch in_features"],
        y: Float[Array, "*batch out_features"],
        base: nnx.Linear | QuantLinear,
    ) -> Float[Array, "*batch out_features"]:
        """What is added to ``y = base(x)``."""
        dropped = x if self.dropout is None else self.dropout(x)
        dropped, a, b = gradients_together(dropped, self.lora_a[...], self.lora_b[...])
        inner = dropped @ a.astype(y.dtype)
        # In float32, so that a scale is not rounded on its own; and where it is
        # cheapest, on the r columns between the factors.
        inner = (self.scale[...] * inner.astype(jnp.float32)).astype(y.dtype)
        update = inner @ b.astype(y.dtype)
        if self.magnitude is None:
            return update
        if self.dropout is not None and not self.dropout.deterministic:
            y = base(dropped)
        if base.bias is not None:
            y = y - base.bias[...].astype(y.dtype)
        factor = self._factor(weight_of(base))
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * update

    def change(
        self, weight: Float32[Array, "*stack in_features out_features"]
    ) -> Float32[Array, "*stack in_features out_features"]:
        """What is added to the weight, in effect, but for dropout."""
        product = self._product()
        if self.magnitude is None:
            return product
        factor = self._factor(weight)[..., None, :]
        return (factor - 1) * weight + factor * product

    def _product(self) -> Float32[Array, "*stack in_features out_features"]:
        a, b = self.lora_a[...], self.lora_b[...]
        return _init.product(a, b, self.scale[...])

    def _factor(
        self, weight: Float32[Array, "*stack in_features out_features"]
    ) -> Float32[Array, "*stack out_features"]:
        """DoRA's magnitude over the norm it scales, which gets no gradient."""
        assert self.magnitude is not None
        norm = jax.lax.stop_gradient(_init.column_norms(weight + self._product()))
        # A column of zeros has no direction to scale.
        norm = jnp.where(norm > 0, norm, 1.0)
        return self.magnitude[...] / norm


class LoraLinear(nnx.Module):
    r"""A frozen linear layer with adapters: trainable low-rank updates, by name.

    .. math:: y = \mathrm{base}(x) + s \, x A B, \qquad s = \alpha / r

    With ``use_dora``, for the weight ``W`` of ``base`` and its magnitude ``m``,

    .. math:: y = x \, (W + s A B) \, \mathrm{diag}(m / \lVert W + s A B \rVert) + b

    Attributes:
        base: the layer adapted, ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear`.
        adapters: ``nnx.Dict`` of `LoraAdapter` by name.
        active: names of those whose updates are added; see `set_adapter`.
        adapter_index: which of them each row uses; see `adapter_rows`. None for all.

    Args:
        base: the layer to adapt; a stack of layers, kernels ``(*stack, in, out)``, gets
            a stack of adapters.
        config: rank and scale.
        name: of the first adapter.
        rngs: its ``params`` stream seeds ``lora_a``, its ``dropout`` stream dropout.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> base = jaxbnb.nnx.QuantLinear(128, 64, rngs=nnx.Rngs(0))
        >>> layer = jaxbnb.lora.LoraLinear(base, jaxbnb.lora.LoraConfig(r=4),
        ...                                rngs=nnx.Rngs(1))
        >>> x = jnp.ones((2, 128))
        >>> bool(jnp.array_equal(layer(x), base(x)))
        True
        >>> layer.adapters["default"].lora_a.shape
        (128, 4)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024.
    """

    def __init__(
        self,
        base: nnx.Linear | QuantLinear,
        config: LoraConfig | None = None,
        *,
        name: str = DEFAULT,
        rngs: nnx.Rngs,
    ):
        self.base = base
        self.adapters: nnx.Dict[LoraAdapter] = nnx.Dict()
        self.active: tuple[str, ...] = (name,)
        self.adapter_index: AdapterIndex | None = nnx.data(None)
        if config is not None:
            self.add(config, name=name, rngs=rngs)

    def add(
        self,
        config: LoraConfig,
        *,
        name: str,
        rngs: nnx.Rngs,
        quant: QuantConfig | None = None,
        names: Sequence[Sequence[str]] | None = None,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        """Adds an adapter; `add_adapter` does so for a model, and checks.

        Args:
            config: rank, scale, and how it starts.
            name: of the adapter.
            rngs: its ``params`` stream seeds the factors.
            quant: to quantise ``base``, when the factors have been taken out of it.
            names: that each layer of the stack goes by, for the patterns of ``config``.
            ranks: of each layer of the stack; None for what ``config`` says.
        """
        *stack, fan_in, fan_out = self.base.kernel.get_value().shape
        count = math.prod(stack)
        names = [()] * count if names is None else names
        ranks = tuple(config.rank_of(*n) for n in names) if ranks is None else ranks
        scales = [
            config.scaling_of(*n) if rank else 0.0
            for n, rank in zip(names, ranks, strict=True)
        ]
        scale = jnp.asarray(scales, jnp.float32).reshape(stack)
        used = jnp.arange(max(ranks)) < jnp.asarray(ranks).reshape(*stack, 1)
        init, weight, rest = config.init_lora_weights, None, None
        shape = (*stack, fan_in, fan_out)
        if init in FROM_WEIGHT:
            weight = weight_of(self.base)
        if init == "loftq":
            assert weight is not None
            assert quant is not None
            dtype = self.base.kernel.get_value().dtype
            rest, (a, b) = _init.loftq(
                weight, used, scale, quant, config.loftq_iter, dtype
            )
        else:
            a, b = _init.factors(init, weight, shape, used, scale, rngs)
            if weight is not None:
                rest = weight - _init.product(a, b, scale)
        if rest is not None:
            kernel: Any = self.base.kernel
            kernel.set_value(stored_like(self.base, rest))
        if quant is not None and not isinstance(self.base, QuantLinear):
            self.base = QuantLinear.from_linear(self.base, quant)
        magnitude = None
        if config.use_dora:
            weight = weight_of(self.base)
            magnitude = _init.column_norms(weight + _init.product(a, b, scale))
        self.adapters[name] = LoraAdapter(
            a, b, scale, magnitude=magnitude, config=config, ranks=ranks, rngs=rngs
        )

    def __call__(
        self, inputs: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer along the last axis of ``inputs``."""
        y = self.base(inputs)
        x = inputs.astype(y.dtype)
        result = y
        for number, name in enumerate(self.active):
            if name not in self.adapters:
                continue
            update = self.adapters[name].update(x, y, self.base)
            if self.adapter_index is not None:
                rows = self._rows(self.adapter_index[...], number, inputs.shape)
                update = jnp.where(rows, update, jnp.zeros_like(update))
            result = result + update
        return result

    def _rows(self, index: Int[Array, " batch"], number: int, shape: tuple[int, ...]):
        if len(shape) < 2 or shape[0] != index.shape[0]:
            raise ValueError(
                f"adapter_index has {index.shape[0]} rows; a layer got inputs of shape "
                f"{shape}, whose first axis is another; give an index a row"
            )
        return (index == number).reshape(-1, *(1 for _ in shape[1:]))


def weight_of(
    base: nnx.Linear | QuantLinear,
) -> Float32[Array, "*stack in_features out_features"]:
    """The matrix that a layer multiplies by, in float32."""
    check_is_matrix(base)
    kernel: Any = base.kernel.get_value()
    if isinstance(kernel, QuantizedArray):
        return kernel.dequantize(jnp.float32)
    return jnp.asarray(kernel, jnp.float32)


def check_is_matrix(base: nnx.Module) -> None:
    """A subclass may do something else with its kernel.

    Raises:
        ValueError: the layer is a subclass.
    """
    if type(base) not in (nnx.Linear, QuantLinear):
        raise ValueError(
            "DoRA, merging and adapters that start from the weight need a layer that "
            f"multiplies by its kernel, nnx.Linear or QuantLinear; got {type(base)}"
        )


def stored_like(
    base: nnx.Linear | QuantLinear, weight: Float32[Array, "*stack in out"]
) -> Array | QuantizedArray:
    """A matrix in the format and dtype of the one that a layer has."""
    weight = weight.astype(base.kernel.get_value().dtype)
    if isinstance(base, QuantLinear):
        return base.config.quantize_kernel(weight)
    return weight
