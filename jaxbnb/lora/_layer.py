"""LoraLinear: a frozen linear layer and its adapters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.core.contraction import Product
from jaxbnb.lora import _init
from jaxbnb.lora._base import (
    Base,
    Quantized,
    axes_of,
    bias_of,
    num_layers,
    product_of,
    quantized,
    stack_of,
    stored_like,
    weight_of,
)
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._order import gradients_together

DEFAULT = "default"


class LoraScale(nnx.Variable[jax.Array]):
    """What an update is multiplied by: one number a layer, not trained."""


class AdapterIndex(nnx.Variable[jax.Array]):
    """Which adapter each row of a batch goes through; see `adapter_rows`."""


class LoraAdapter(nnx.Module):
    """One adapter of one linear layer, or of a stack of them.

    It is of the kernel seen as matrices ``(*stack, *batch, fan_in, fan_out)``: the axes
    that the product sums over flattened to one, and those of the outputs, in the order
    of the kernel; ``batch`` is empty but for a layer of several kernels, e.g. experts,
    which get a pair of factors each.

    Attributes:
        lora_a: ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_in, r)``.
        lora_b: ``nnx.LoRAParam`` of shape ``(*stack, *batch, r, fan_out)``.
        magnitude: of DoRA, ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_out)``; or
            None.
        scale: `LoraScale` of shape ``stack``.
        dropout: ``nnx.Dropout``, or None; ``model.train()`` and ``model.eval()`` switch
            it.
        config: the `LoraConfig`.
        ranks: of each layer of the stack; 0 for those without an adapter.
    """

    def __init__(
        self,
        lora_a: Float[Array, "*stack_batch fan_in r"],
        lora_b: Float[Array, "*stack_batch r fan_out"],
        scale: Float32[Array, "*stack"],
        *,
        magnitude: Float32[Array, "*stack_batch fan_out"] | None,
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
        x: Float[Array, "*inputs"],
        y: Float[Array, "*outputs"],
        base: Base,
        product: Product,
        einsum_str: str | None = None,
    ) -> Float[Array, "*outputs"]:
        """What is added to ``y = base(x)``.

        Args:
            x: the input, in the dtype of ``y``.
            y: the result.
            base: the layer.
            product: of the layer with this input.
            einsum_str: that the layer was called with.
        """
        dropped = x if self.dropout is None else self.dropout(x)
        update = product(dropped, self._multiply)
        if self.magnitude is None:
            return update
        if self.dropout is not None and not self.dropout.deterministic:
            y = base(dropped, **_options(einsum_str))
        bias = bias_of(base, product, einsum_str)
        if bias is not None:
            y = y - bias.astype(y.dtype)
        factor = product.columns(self._factor(weight_of(base)))
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * update

    def _multiply(
        self, rows: Float[Array, "*rows fan_in"]
    ) -> Float[Array, "*rows fan_out"]:
        """The product of rows with ``scale * A B``."""
        rows, a, b = gradients_together(rows, self.lora_a[...], self.lora_b[...])
        inner = rows @ a.astype(rows.dtype)
        # In float32, so that a scale is not rounded on its own; and where it is
        # cheapest, on the r columns between the factors.
        inner = (self.scale[...] * inner.astype(jnp.float32)).astype(rows.dtype)
        return inner @ b.astype(rows.dtype)

    def change(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        """What is added to the weight, in effect, but for dropout."""
        product = self._product()
        if self.magnitude is None:
            return product
        factor = self._factor(weight)[..., None, :]
        return (factor - 1) * weight + factor * product

    def _product(self) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        a, b = self.lora_a[...], self.lora_b[...]
        return _init.product(a, b, self.scale[...])

    def _factor(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_out"]:
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

    A layer over other axes than the last, e.g. of attention heads or of experts, is
    adapted as the matrices that it multiplies by; see `LoraAdapter`.

    Attributes:
        base: the layer adapted: ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``,
            or `jaxbnb.nnx.QuantLinear`, `QuantLinearGeneral`, `QuantEinsum`.
        adapters: ``nnx.Dict`` of `LoraAdapter` by name.
        active: names of those whose updates are added; see `set_adapter`.
        adapter_index: which of them each row uses; see `adapter_rows`. None for all.

    Args:
        base: the layer to adapt; a stack of layers, kernels ``(*stack, ...)``, gets a
            stack of adapters.
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
        base: Base,
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
        quant: QuantConfig | str | None = None,
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
        quant = None if quant is None else as_config(quant)
        stack, count = stack_of(self.base), num_layers(self.base)
        names = [()] * count if names is None else names
        ranks = tuple(config.rank_of(*n) for n in names) if ranks is None else ranks
        scales = [
            config.scaling_of(*n) if rank else 0.0
            for n, rank in zip(names, ranks, strict=True)
        ]
        scale = jnp.asarray(scales, jnp.float32).reshape(stack)
        used = jnp.arange(max(ranks)) < jnp.asarray(ranks).reshape(*stack, 1)
        init, weight, rest = config.init_lora_weights, None, None
        shape = (*stack, *axes_of(self.base).matrix_shape)
        if init in FROM_WEIGHT:
            weight = weight_of(self.base)
        if init == "loftq":
            assert weight is not None
            assert quant is not None
            kernel: Any = self.base.kernel
            dtype = kernel.get_value().dtype
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
        if quant is not None and not isinstance(self.base, Quantized):
            self.base = quantized(self.base, quant)
        magnitude = None
        if config.use_dora:
            weight = weight_of(self.base)
            magnitude = _init.column_norms(weight + _init.product(a, b, scale))
        self.adapters[name] = LoraAdapter(
            a, b, scale, magnitude=magnitude, config=config, ranks=ranks, rngs=rngs
        )

    @property
    def kernel(self) -> nnx.Variable[Any]:
        """Of ``base``; models read the sizes of their heads from its shape."""
        return self.base.kernel

    def __call__(
        self,
        inputs: Float[Array, "*inputs"],
        einsum_str: str | None = None,
        *,
        out_sharding: Any = None,
    ) -> Float[Array, "*outputs"]:
        """Applies the layer.

        Args:
            inputs: as ``base`` takes them.
            einsum_str: of an einsum alone, another that sums the same axes.
            out_sharding: None, which Flax's own modules pass.

        Raises:
            NotImplementedError: ``out_sharding`` is given.
        """
        if out_sharding is not None:
            raise NotImplementedError(
                f"a layer with adapters takes no out_sharding, got {out_sharding}; use "
                "a mesh of automatic axes, or jax.sharding.auto_axes around the layer"
            )
        y = self.base(inputs, **_options(einsum_str))
        chosen = [name for name in self.active if name in self.adapters]
        if not chosen:
            return y
        product = product_of(self.base, inputs.ndim, einsum_str)
        x = inputs.astype(y.dtype)
        result = y
        for name in chosen:
            update = self.adapters[name].update(x, y, self.base, product, einsum_str)
            if self.adapter_index is not None:
                number = self.active.index(name)
                rows = _rows(self.adapter_index[...], number, product, inputs.shape)
                update = jnp.where(rows, update, jnp.zeros_like(update))
            result = result + update
        return result


def _options(einsum_str: str | None) -> dict[str, str]:
    # Only an einsum takes it.
    return {} if einsum_str is None else {"einsum_str": einsum_str}


def _rows(
    index: Int[Array, " batch"], number: int, product: Product, shape: tuple[int, ...]
) -> Array:
    """Which rows of a result go through an adapter, to be broadcast to the result."""
    fits = len(shape) > 1 and shape[0] == index.shape[0] and 0 in product.rest
    if not fits:
        raise ValueError(
            f"adapter_index has {index.shape[0]} rows; a layer got inputs of shape "
            f"{shape}, whose first axis is another, or is summed over or one of "
            "experts; give an index a row"
        )
    place = product.order.index(len(product.batch))
    rows = (index == number).reshape(-1, *(1 for _ in product.order[1:]))
    return jnp.moveaxis(rows, 0, place)
