"""LoRA for Equinox models: adapters beside frozen layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxbnb.core.paths import matches
from jaxbnb.core.tree import path_of
from jaxbnb.equinox._layers import QuantLinear, eqx
from jaxbnb.lora import lora_tree


class LoraLinear(eqx.Module):
    r"""A linear layer with a trainable low-rank update.

    .. math:: y = \mathrm{base}(x) + s \, x A B

    Attributes:
        base: `QuantLinear` or ``eqx.nn.Linear``.
        lora_a: float32 array of shape ``(in_features, r)``.
        lora_b: float32 array of shape ``(r, out_features)``.
        scaling: factor ``s`` of the update.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxbnb
        >>> base = eqx.nn.Linear(64, 32, key=jax.random.key(0))
        >>> layer = jaxbnb.equinox.LoraLinear(
        ...     base, jnp.ones((64, 4)), jnp.zeros((4, 32)), scaling=2.0)
        >>> layer(jnp.ones(64)).shape
        (32,)
    """

    base: Any
    lora_a: Float32[Array, "*stack in_features r"]
    lora_b: Float32[Array, "*stack r out_features"]
    scaling: float = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "in_features"], *, key: jax.Array | None = None
    ) -> Float[Array, "out_features"]:
        """Applies the layer to a vector; ``jax.vmap`` applies it to several."""
        y = self.base(x, key=key)
        inner = jnp.atleast_1d(x).astype(y.dtype) @ self.lora_a.astype(y.dtype)
        update = inner @ (self.scaling * self.lora_b).astype(y.dtype)
        return y + update.reshape(y.shape)


def add_adapters(
    model: Any,
    r: int = 8,
    *,
    key: jax.Array,
    alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Any:
    """Returns a model with a `LoraLinear` in place of each targeted linear layer.

    ``lora_b`` is zeros, so the model computes the same at first. Train what
    `adapter_filter` selects; ``eqx.filter_grad`` alone would also train biases, norms
    and everything else that is not quantised.

    Args:
        model: Equinox model, such as `quantize_model` returns.
        r: rank of the update.
        key: random key of ``lora_a``, which is uniform as in PEFT.
        alpha: numerator of the scale ``alpha / r``; None for ``r``.
        target_modules: layers to adapt: names, each a whole dotted path or its last
            parts, or one regular expression for whole paths. None for all quantised
            linear layers.

    Raises:
        ValueError: ``r`` is not positive, or no layer without adapters is selected.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> model = eqx.nn.MLP(64, 64, 64, depth=1, key=jax.random.key(0))
        >>> model = jaxbnb.equinox.quantize_model(model, "nf4")
        >>> model = jaxbnb.equinox.add_adapters(model, r=4, key=jax.random.key(1))
        >>> model.layers[0].lora_a.shape
        (64, 4)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """

    def is_layer(node: Any) -> bool:
        return isinstance(node, QuantLinear | eqx.nn.Linear | LoraLinear)

    found = jax.tree.leaves_with_path(model, is_leaf=is_layer)
    # Layers whose weight eqx.nn.Shared gives them have a placeholder for it.
    layers = {
        path_of(path): layer
        for path, layer in found
        if is_layer(layer) and hasattr(getattr(layer, "weight", None), "mT")
    }
    weights = {
        path: layer.weight.mT
        for path, layer in layers.items()
        if (
            isinstance(layer, QuantLinear)
            if target_modules is None
            else matches(path, target_modules)
        )
    }
    if not weights:
        adapted = [path_of(p) for p, layer in found if isinstance(layer, LoraLinear)]
        wanted = "quantised linear layer" if target_modules is None else "linear layer"
        raise ValueError(
            f"target_modules={target_modules!r} selects no {wanted} of "
            f"{type(model).__name__}: {', '.join(layers) or 'none'}. Layers with "
            f"adapters already: {', '.join(adapted) or 'none'}"
        )
    factors = lora_tree(weights, r, key=key, target_modules=".*")
    scaling = 1.0 if alpha is None else alpha / r

    def adapt(path: Any, layer: Any) -> Any:
        if path_of(path) not in factors:
            return layer
        return LoraLinear(layer, **factors[path_of(path)], scaling=scaling)

    return jax.tree_util.tree_map_with_path(adapt, model, is_leaf=is_layer)


def adapter_filter(model: Any) -> Any:
    r"""Returns a tree like ``model``: True for factors of adapters, False for the rest.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> model = eqx.nn.MLP(64, 64, 64, depth=1, key=jax.random.key(0))
        >>> model = jaxbnb.equinox.add_adapters(
        ...     model, r=4, key=jax.random.key(1), target_modules=r"layers\..*")
        >>> adapters, rest = eqx.partition(model, jaxbnb.equinox.adapter_filter(model))
        >>> [x.shape for x in jax.tree.leaves(adapters)]
        [(64, 4), (4, 64), (64, 4), (4, 64)]
    """

    def mark(node: Any) -> Any:
        marks = jax.tree.map(lambda _: False, node)
        if not isinstance(node, LoraLinear):
            return marks
        return eqx.tree_at(
            lambda layer: (layer.lora_a, layer.lora_b), marks, (True,) * 2
        )

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, LoraLinear))


def merge_adapters(model: Any) -> Any:
    """Returns a model with the updates added to the weights, in plain linear layers.

    Quantised weights are decoded, since the sums would be rounded again.

    Raises:
        ValueError: the model does not have adapters.

    Example:
        >>> import equinox as eqx, jax, jaxbnb
        >>> model = eqx.nn.MLP(64, 64, 64, depth=1, key=jax.random.key(0))
        >>> model = jaxbnb.equinox.quantize_model(model, "nf4")
        >>> model = jaxbnb.equinox.add_adapters(model, r=4, key=jax.random.key(1))
        >>> type(jaxbnb.equinox.merge_adapters(model).layers[0]).__name__
        'Linear'
    """
    merged = []

    def merge(layer: Any) -> Any:
        if not isinstance(layer, LoraLinear):
            return layer
        merged.append(layer)
        base = layer.base
        linear = base.to_linear() if isinstance(base, QuantLinear) else base
        update = layer.scaling * (layer.lora_a @ layer.lora_b).mT
        weight = linear.weight + update.astype(linear.weight.dtype)
        return eqx.tree_at(lambda x: x.weight, linear, weight)

    result = jax.tree.map(merge, model, is_leaf=lambda x: isinstance(x, LoraLinear))
    if not merged:
        raise ValueError(f"{type(model).__name__} does not have adapters")
    return result
