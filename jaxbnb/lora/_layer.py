"""LoraLinear: a frozen linear layer and its adapters."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.core.contraction import Product
from jaxbnb.lora import _init
from jaxbnb.lora._base import (
    Base,
    Embedding,
    Quantized,
    call_base,
    get_axes,
    get_bias,
    get_param,
    get_product,
    get_stack,
    get_weight,
    num_layers,
    quantize_base,
    spread_bias,
    store_like,
)
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._factors import LoraAdapter, make_options
from jaxbnb.lora._switch import AdaptedModule
from jaxbnb.lora._tokens import TrainedTokens
from jaxbnb.lora._trained import copy_for_training

DEFAULT = "default"


class LoraLayer(AdaptedModule):
    """A frozen linear layer or embedding with named adapters; fields as in its base."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that stack layers in front of the kernel."""
        return get_stack(self.base)

    def check_active(self, path: str, names: tuple[str, ...]) -> None:
        """Raises ValueError if two adapters replace the row of the same token."""
        owner: dict[int, str] = {}
        for name in names:
            adapter = self.adapters.get(name)
            tokens = adapter.token_indices if isinstance(adapter, TrainedTokens) else ()
            for token in tokens:
                if token in owner:
                    raise ValueError(
                        f"{path}: the adapters {owner[token]!r} and {name!r} both "
                        f"replace the row of token {token}; activate one of them"
                    )
                owner[token] = name

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
            kernel: Any = get_param(self.base)
            dtype = kernel.get_value().dtype
            remainder, (a, b) = _init.fit_loftq(
                weight, is_used, scale, quant, config.loftq_iter, dtype
            )
        elif isinstance(self.base, Embedding):
            a, b = _init.make_embedding_factors(init, shape, is_used, rngs)
        else:
            a, b = _init.make_factors(init, weight, shape, is_used, scale, rngs)
            if weight is not None:
                remainder = weight - _init.multiply_factors(a, b, scale)
        if remainder is not None:
            kernel: Any = get_param(self.base)
            kernel.set_value(store_like(self.base, remainder))
        if quant is not None and not isinstance(self.base, Quantized):
            self.base = quantize_base(self.base, quant)
        magnitude = None
        if config.use_dora:
            magnitude = self._compute_magnitude(a, b, scale)
        self.adapters[name] = LoraAdapter(
            a, b, scale, magnitude=magnitude, config=config, ranks=ranks, rngs=rngs
        )

    def set_factors(
        self,
        name: str,
        a: Float[Array, "*stack_batch fan_in r"],
        b: Float[Array, "*stack_batch r fan_out"],
    ) -> None:
        """Sets the factors of an adapter, and DoRA's magnitude to that of the sum.

        Args:
            name: name of the adapter.
            a: ``lora_a``.
            b: ``lora_b``.
        """
        adapter = self.adapters[name]
        adapter.lora_a.set_value(a)
        adapter.lora_b.set_value(b)
        if adapter.magnitude is not None:
            adapter.magnitude.set_value(
                self._compute_magnitude(a, b, adapter.scale[...])
            )

    def _compute_magnitude(self, a: Array, b: Array, scale: Array) -> Array:
        update = _init.multiply_factors(a, b, scale)
        return _init.compute_column_norms(get_weight(self.base) + update)


class LoraLinear(LoraLayer):
    r"""A frozen linear layer with named adapters, which are trainable low-rank updates.

    .. math:: y = \mathrm{base}(x) + s \, x A B, \qquad s = \alpha / r

    With ``use_dora``, the weight ``W`` of ``base`` and a magnitude ``m``,

    .. math:: y = x \, (W + s A B) \, \mathrm{diag}(m / \lVert W + s A B \rVert) + b

    A layer that contracts other axes than the last, e.g. for attention heads or
    experts, is adapted as the matrices that it multiplies by; see `LoraAdapter`.

    Attributes:
        base: the adapted layer: ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``,
            or `jaxbnb.nnx.QuantLinear`, `QuantLinearGeneral`, `QuantEinsum`.
        adapters: ``nnx.Dict`` of `LoraAdapter` by name; or, for the rows of an output
            head that ``trainable_token_indices`` names, of `TrainedTokens`.
        biases: ``nnx.Dict`` of each adapter's own bias, an ``nnx.LoRAParam`` in the
            shape of the layer's; see ``bias`` of `LoraConfig`.
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
        super().__init__(base, (name,))
        self.biases: nnx.Dict[nnx.LoRAParam] = nnx.Dict()
        if config is not None:
            self.add(config, name=name, rngs=rngs)
            if config.bias != "none":
                self.add_bias(name)

    def add_bias(self, name: str) -> None:
        """Gives an adapter a bias of its own, if the layer has one."""
        bias = get_bias(self.base)
        if bias is not None:
            self.biases[name] = copy_for_training(bias, jnp.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that this layer has a part of."""
        return tuple(dict.fromkeys((*self.adapters, *self.biases)))

    @property
    def kernel(self) -> nnx.Variable[Any]:
        """The kernel of ``base``; models read the sizes of heads from its shape."""
        return get_param(self.base)

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
        y = call_base(self.base, inputs, make_options(einsum_str))
        chosen = self._chosen()
        if not chosen:
            return y
        product = get_product(self.base, inputs.ndim, einsum_str)
        x = inputs.astype(y.dtype)
        result = y
        for name in chosen:
            update = self._update(name, x, y, product, einsum_str)
            if self.adapter_index is not None:
                number = self.active.index(name)
                rows = _select_rows(
                    self.adapter_index[...], number, product, inputs.shape
                )
                update = jnp.where(rows, update, jnp.zeros_like(update))
            result = result + update
        return result

    def _update(
        self,
        name: str,
        x: Float[Array, "*inputs"],
        y: Float[Array, "*outputs"],
        product: Product,
        einsum_str: str | None,
    ) -> Float[Array, "*outputs"]:
        """Computes what one adapter adds to ``y = base(x)``."""
        update = jnp.zeros_like(y)
        if name in self.adapters:
            update = self.adapters[name].update(x, y, self.base, product, einsum_str)
        change = self.bias_change(name)
        if change is not None:
            change = spread_bias(self.base, change, product, einsum_str)
            update = update + change.astype(y.dtype)
        return update

    @property
    def is_sum(self) -> bool:
        """Whether all rows get the same sum of ``scale * x A B`` now.

        Dropout, DoRA, biases of adapters, and an adapter for each row are more.
        """
        chosen = [self.adapters.get(name) for name in self._chosen()]
        is_sum = all(isinstance(a, LoraAdapter) and a.is_linear for a in chosen)
        return is_sum and not self.biases and self.adapter_index is None

    def update_groups(
        self, x: Float[Array, "m fan_in"], sizes: Int[Array, " groups"]
    ) -> Float[Array, "m fan_out"] | Float[Array, ""]:
        """Computes what the active adapters add to rows, sorted by layer of the stack.

        Args:
            x: input, in the dtype of the result; `is_sum` is true.
            sizes: number of rows of each layer.
        """
        updates = (self.adapters[n].update_groups(x, sizes) for n in self._chosen())
        return sum(updates, jnp.zeros((), x.dtype))

    def bias_change(self, name: str) -> Float32[Array, "*stack_outputs"] | None:
        """Computes what an adapter adds to the bias; None if it has none of its own."""
        bias = get_bias(self.base)
        if bias is None or name not in self.biases:
            return None
        return self.biases[name][...] - bias[...].astype(jnp.float32)


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
