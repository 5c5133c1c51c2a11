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
    get_axes,
    get_bias,
    get_product,
    get_stack,
    get_weight,
    num_layers,
    quantize_base,
    store_like,
)
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig

DEFAULT = "default"


class LoraScale(nnx.Variable[jax.Array]):
    """The factor of an update: one number per layer, not trained."""


class AdapterIndex(nnx.Variable[jax.Array]):
    """The adapter that each row of a batch uses; see `adapter_rows`."""


class LoraAdapter(nnx.Module):
    """An adapter of a linear layer, or of a stack of linear layers.

    It treats the kernel as matrices ``(*stack, *batch, fan_in, fan_out)``. The axes
    that the product sums over are flattened to ``fan_in``, and those of the outputs to
    ``fan_out``, in the order of the kernel. ``batch`` is empty unless a layer has
    several kernels, e.g. of experts. Then each kernel has a pair of factors.

    Attributes:
        lora_a: ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_in, r)``.
        lora_b: ``nnx.LoRAParam`` of shape ``(*stack, *batch, r, fan_out)``.
        magnitude: DoRA's ``nnx.LoRAParam`` of shape ``(*stack, *batch, fan_out)``, or
            None.
        scale: `LoraScale` of shape ``stack``.
        dropout: ``nnx.Dropout``, or None; ``model.train()`` and ``model.eval()`` switch
            it on and off.
        config: the `LoraConfig`.
        ranks: rank of each layer in the stack; 0 for layers without an adapter.
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
            # Each layer of a stack gets a stream, which is scanned over with the rest.
            # Dropout's initializer cannot fork a stream that is split already.
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
        """Computes the update that is added to ``y = base(x)``.

        Args:
            x: input, in the dtype of ``y``.
            y: result of the layer.
            base: the layer.
            product: description of how the layer multiplies this input.
            einsum_str: equation that the layer was called with.
        """
        dropped = x if self.dropout is None else self.dropout(x)
        update = product(dropped, self._apply)
        if self.magnitude is None:
            return update
        if self.dropout is not None and not self.dropout.deterministic:
            y = base(dropped, **_make_options(einsum_str))
        bias = get_bias(base, product, einsum_str)
        if bias is not None:
            y = y - bias.astype(y.dtype)
        factor = product.columns(self._compute_factor(get_weight(base)))
        return (factor - 1).astype(y.dtype) * y + factor.astype(y.dtype) * update

    def _apply(
        self, rows: Float[Array, "*rows fan_in"]
    ) -> Float[Array, "*rows fan_out"]:
        """Multiplies rows by ``scale * A B``."""
        a, b = self.lora_a[...], self.lora_b[...]
        inner = rows @ a.astype(rows.dtype)
        # The scale is applied in float32, so that it is not rounded on its own, and
        # between the factors, where there are only r columns.
        inner = (self.scale[...] * inner.astype(jnp.float32)).astype(rows.dtype)
        return inner @ b.astype(rows.dtype)

    def change(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        """Computes what the adapter adds to the weight, in effect, without dropout."""
        product = self._multiply_factors()
        if self.magnitude is None:
            return product
        factor = self._compute_factor(weight)[..., None, :]
        return (factor - 1) * weight + factor * product

    def _multiply_factors(self) -> Float32[Array, "*stack_batch fan_in fan_out"]:
        a, b = self.lora_a[...], self.lora_b[...]
        return _init.multiply_factors(a, b, self.scale[...])

    def _compute_factor(
        self, weight: Float32[Array, "*stack_batch fan_in fan_out"]
    ) -> Float32[Array, "*stack_batch fan_out"]:
        """Computes DoRA's magnitude over the norm; the norm does not get a gradient."""
        assert self.magnitude is not None
        norm = jax.lax.stop_gradient(
            _init.compute_column_norms(weight + self._multiply_factors())
        )
        # A column of zeros does not have a direction to scale.
        norm = jnp.where(norm > 0, norm, 1.0)
        return self.magnitude[...] / norm


class LoraLinear(nnx.Module):
    r"""A frozen linear layer with named adapters, which are trainable low-rank updates.

    .. math:: y = \mathrm{base}(x) + s \, x A B, \qquad s = \alpha / r

    With ``use_dora``, the weight ``W`` of ``base`` and a magnitude ``m``,

    .. math:: y = x \, (W + s A B) \, \mathrm{diag}(m / \lVert W + s A B \rVert) + b

    A layer that contracts other axes than the last, e.g. for attention heads or
    experts, is adapted as the matrices that it multiplies by; see `LoraAdapter`.

    Attributes:
        base: the adapted layer: ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``,
            or `jaxbnb.nnx.QuantLinear`, `QuantLinearGeneral`, `QuantEinsum`.
        adapters: ``nnx.Dict`` of `LoraAdapter` by name.
        active: names of the adapters that are applied; see `set_adapter`.
        adapter_index: the active adapter that each row uses, see `adapter_rows`; None
            if every row uses all of them.

    Args:
        base: the layer to adapt; a stack of layers, with kernels ``(*stack, ...)``,
            gets a stack of adapters.
        config: rank and scale.
        name: name of the first adapter.
        rngs: random streams; ``params`` seeds ``lora_a``, and ``dropout`` dropout.

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
        """Adds an adapter without checks; use `add_adapter` to check and adapt a model.

        Args:
            config: rank, scale and initialisation.
            name: name of the adapter.
            rngs: random streams; ``params`` seeds the factors.
            quant: format to quantise ``base`` to, after the factors were taken out of
                it; None for no quantisation.
            names: names of each layer in the stack, for the patterns of ``config``.
            ranks: rank of each layer in the stack; None to ask ``config``.
        """
        quant = None if quant is None else as_config(quant)
        stack, count = get_stack(self.base), num_layers(self.base)
        names = [()] * count if names is None else names
        ranks = tuple(config.rank_of(*n) for n in names) if ranks is None else ranks
        scales = [
            config.scaling_of(*n) if rank else 0.0
            for n, rank in zip(names, ranks, strict=True)
        ]
        scale = jnp.asarray(scales, jnp.float32).reshape(stack)
        is_used = jnp.arange(max(ranks)) < jnp.asarray(ranks).reshape(*stack, 1)
        init, weight, remainder = config.init_lora_weights, None, None
        shape = (*stack, *get_axes(self.base).matrix_shape)
        if init in FROM_WEIGHT:
            weight = get_weight(self.base)
        if init == "loftq":
            assert weight is not None
            assert quant is not None
            kernel: Any = self.base.kernel
            dtype = kernel.get_value().dtype
            remainder, (a, b) = _init.fit_loftq(
                weight, is_used, scale, quant, config.loftq_iter, dtype
            )
        else:
            a, b = _init.make_factors(init, weight, shape, is_used, scale, rngs)
            if weight is not None:
                remainder = weight - _init.multiply_factors(a, b, scale)
        if remainder is not None:
            kernel: Any = self.base.kernel
            kernel.set_value(store_like(self.base, remainder))
        if quant is not None and not isinstance(self.base, Quantized):
            self.base = quantize_base(self.base, quant)
        magnitude = None
        if config.use_dora:
            weight = get_weight(self.base)
            magnitude = _init.compute_column_norms(
                weight + _init.multiply_factors(a, b, scale)
            )
        self.adapters[name] = LoraAdapter(
            a, b, scale, magnitude=magnitude, config=config, ranks=ranks, rngs=rngs
        )

    @property
    def kernel(self) -> nnx.Variable[Any]:
        """The kernel of ``base``; models read the sizes of heads from its shape."""
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
            inputs: inputs in the form that ``base`` takes.
            einsum_str: another equation that sums the same axes; only for an einsum.
            out_sharding: None, as Flax's modules pass it.

        Raises:
            NotImplementedError: ``out_sharding`` is not None.
        """
        if out_sharding is not None:
            raise NotImplementedError(
                "a layer with adapters does not take an out_sharding, got "
                f"{out_sharding}; use a mesh of automatic axes, or "
                "jax.sharding.auto_axes around the layer"
            )
        y = self.base(inputs, **_make_options(einsum_str))
        chosen = [name for name in self.active if name in self.adapters]
        if not chosen:
            return y
        product = get_product(self.base, inputs.ndim, einsum_str)
        x = inputs.astype(y.dtype)
        result = y
        for name in chosen:
            update = self.adapters[name].update(x, y, self.base, product, einsum_str)
            if self.adapter_index is not None:
                number = self.active.index(name)
                rows = _select_rows(
                    self.adapter_index[...], number, product, inputs.shape
                )
                update = jnp.where(rows, update, jnp.zeros_like(update))
            result = result + update
        return result


def _make_options(einsum_str: str | None) -> dict[str, str]:
    # Only an einsum takes this argument.
    return {} if einsum_str is None else {"einsum_str": einsum_str}


def _select_rows(
    index: Int[Array, " batch"], number: int, product: Product, shape: tuple[int, ...]
) -> Array:
    """Returns whether each row uses an adapter, to be broadcast to the result."""
    has_rows = len(shape) > 1 and shape[0] == index.shape[0] and 0 in product.rest
    if not has_rows:
        raise ValueError(
            f"adapter_index has {index.shape[0]} rows; a layer got inputs of shape "
            f"{shape}. Their first axis must be the rows, of the same number, and "
            "neither summed over nor an axis of experts"
        )
    place = product.order.index(len(product.batch))
    rows = (index == number).reshape(-1, *(1 for _ in product.order[1:]))
    return jnp.moveaxis(rows, 0, place)
