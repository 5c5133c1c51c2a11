"""merge and unmerge: put adapters into the weights, and take them out again."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.lora._base import Base, check_is_matrix, get_weight, num_layers, store_like
from jaxbnb.lora._layer import LoraLinear
from jaxbnb.lora._targets import find_adapted, find_linears
from jaxbnb.nnx import surgery


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of `merge`, which `unmerge` needs.

    Attributes:
        sqnr: signal-to-noise ratio, by layer, of storing the sum in the weight's
            format, in dB: 10 log10 of the sum of squares over that of the errors.
            Infinite if nothing was rounded.
        originals: the original layers, by path.
    """

    sqnr: dict[str, float]
    originals: dict[str, LoraLinear]

    def __str__(self) -> str:
        worst = min(self.sqnr, key=self.sqnr.__getitem__)
        return (
            f"merged {len(self.sqnr)} layers; the lowest SQNR is "
            f"{self.sqnr[worst]:.2f} dB, of {worst}"
        )


def merge(model: nnx.Module) -> Merged:
    """Merges the active adapters into the weights of plain layers, in place.

    A quantised weight is decoded, updated, and quantised again in its format. That
    costs precision, unlike a separate adapter, and ``sqnr`` says how much. NF4 keeps
    about 20 dB, and the update is often smaller than that error. Check it before you
    ship, keep the adapter separate, or merge after `jaxbnb.nnx.dequantize_model`.

    Args:
        model: a model with adapters.

    Returns:
        A `Merged`. It holds the original layers; drop it to free their memory.

    Raises:
        ValueError: no adapter is active, a sum is not finite, or a weight is sharded
            over devices. The model is then unchanged.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> config = jaxbnb.lora.LoraConfig(init_lora_weights=False)
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> merged = jaxbnb.lora.merge(model)
        >>> merged.sqnr, type(model.layers[0]).__name__
        ({'layers.0': inf}, 'Linear')
        >>> jaxbnb.lora.unmerge(model, merged)
        >>> type(model.layers[0]).__name__
        'LoraLinear'
    """
    sqnr: dict[str, float] = {}
    plain: dict[int, nnx.Module] = {}
    for path, names, layer in find_adapted(model):
        plain[id(layer)] = layer.base
        if not set(layer.active).isdisjoint(layer.adapters):
            plain[id(layer)], ratios = _merge_layer(path, layer)
            sqnr.update(zip(names, ratios, strict=True))
    if not sqnr:
        raise ValueError(
            f"{type(model).__name__} has no active adapters to merge; "
            "add_adapter adds one, set_adapter activates it"
        )
    originals: dict[str, LoraLinear] = {}
    for linear in find_linears(model):
        if isinstance(linear.module, LoraLinear):
            originals[linear.path] = linear.module
            surgery.replace_child(linear.parent, linear.key, plain[id(linear.module)])
    return Merged(sqnr, originals)


def unmerge(model: nnx.Module, merged: Merged) -> None:
    """Puts back the layers from before `merge`, bit for bit.

    Subtracting the update from the merged weight would round a second time.

    Args:
        model: the merged model.
        merged: result of `merge` for it.

    Raises:
        ValueError: the model does not have these layers, or they are not merged.

    Example: see `merge`.
    """
    places = {linear.path: linear for linear in find_linears(model)}
    for path, layer in merged.originals.items():
        there = places.get(path)
        shape = layer.kernel.shape
        if (
            there is None
            or isinstance(there.module, LoraLinear)
            or there.module.kernel.shape != shape
        ):
            got = "nothing" if there is None else type(there.module).__name__
            raise ValueError(
                f"unmerge puts a layer with a kernel of shape {shape} back at {path}; "
                f"{type(model).__name__} has {got} there: give what was merged"
            )
    for path, layer in merged.originals.items():
        surgery.replace_child(places[path].parent, places[path].key, layer)


def _merge_layer(path: str, layer: LoraLinear) -> tuple[Base, list[float]]:
    """Returns a layer with the sum as its weight, and the SQNR of each in a stack."""
    base = layer.base
    check_is_matrix(base)
    _check_not_sharded(path, base)
    chosen = [layer.adapters[name] for name in layer.active if name in layer.adapters]
    weight = get_weight(base)
    for change in [adapter.change(weight) for adapter in chosen]:
        weight = weight + change
    # tree_map makes new variables, which share the arrays.
    graphdef, state = nnx.split(base)
    merged = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    kernel: Any = merged.kernel
    kernel.set_value(store_like(base, weight))
    stored = get_weight(merged)
    if not bool(jnp.all(jnp.isfinite(stored))):
        raise ValueError(
            f"{path}: the weight with {layer.active} added is not finite as "
            f"{kernel.get_value().dtype}; its adapter has diverged, or it needs a "
            "wider dtype"
        )
    exact, stored = (np.asarray(x, np.float64) for x in (weight, stored))
    exact, stored = (x.reshape(num_layers(base), -1) for x in (exact, stored))
    return merged, [_sqnr(e, s) for e, s in zip(exact, stored, strict=True)]


def _sqnr(exact: np.ndarray, stored: np.ndarray) -> float:
    noise = float(np.sum((exact - stored) ** 2))
    signal = float(np.sum(exact**2))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _check_not_sharded(path: str, base: Base) -> None:
    for leaf in jax.tree.leaves(base.kernel.get_value()):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and not sharding.is_fully_replicated:
            raise ValueError(
                f"{path} is sharded, {sharding}, and blocks of the sum may cross "
                "devices; merge before sharding, or gather it first with jax.device_put"
            )
