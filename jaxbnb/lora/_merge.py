"""merge and unmerge: adapters into the weights, and out again."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.lora._base import Base, check_is_matrix, num_layers, stored_like, weight_of
from jaxbnb.lora._layer import LoraLinear
from jaxbnb.lora._targets import adapted, linears
from jaxbnb.nnx import surgery


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge` did; `unmerge` takes it.

    Attributes:
        sqnr: by layer, the signal-to-noise ratio of storing the sum in the weight's
            format, in dB: 10 log10 of the sum of squares over that of the errors.
            Infinite where nothing was rounded.
        originals: the layers as they were, by path.
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
    """Adds the active adapters to the weights, which become plain layers, in place.

    A quantised weight is decoded, added to, and quantised again in its own format: that
    costs precision which the adapter beside it did not, and ``sqnr`` says how much.
    NF4 keeps about 20 dB. Often the update is smaller than that error; look before you
    ship, or keep the adapter apart, or merge into `jaxbnb.nnx.dequantize_model`'s.

    Args:
        model: a model with adapters.

    Returns:
        A `Merged`. It holds the layers as they were; drop it to free their memory.

    Raises:
        ValueError: no adapter is active; a sum is not finite; or a weight is sharded
            over devices. The model is then as it was.

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
    for path, names, layer in adapted(model):
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
    for linear in linears(model):
        if isinstance(linear.module, LoraLinear):
            originals[linear.path] = linear.module
            surgery.replace(linear.parent, linear.key, plain[id(linear.module)])
    return Merged(sqnr, originals)


def unmerge(model: nnx.Module, merged: Merged) -> None:
    """Puts the layers back as they were before `merge`, bit for bit.

    To subtract the update from a weight that was quantised with it would round twice.

    Args:
        model: what was merged.
        merged: what `merge` returned for it.

    Raises:
        ValueError: the model has no such layers, or they are not merged.

    Example: see `merge`.
    """
    places = {linear.path: linear for linear in linears(model)}
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
        surgery.replace(places[path].parent, places[path].key, layer)


def _merge_layer(path: str, layer: LoraLinear) -> tuple[Base, list[float]]:
    """A layer with the sum for its weight, and the SQNR of each of a stack."""
    base = layer.base
    check_is_matrix(base)
    _check_not_sharded(path, base)
    chosen = [layer.adapters[name] for name in layer.active if name in layer.adapters]
    weight = weight_of(base)
    for change in [adapter.change(weight) for adapter in chosen]:
        weight = weight + change
    # Variables of its own, as the tree_map makes them, for the same arrays.
    graphdef, state = nnx.split(base)
    new = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    kernel: Any = new.kernel
    kernel.set_value(stored_like(base, weight))
    stored = weight_of(new)
    if not bool(jnp.all(jnp.isfinite(stored))):
        raise ValueError(
            f"{path}: the weight with {layer.active} added is not finite as "
            f"{kernel.get_value().dtype}; its adapter has diverged, or it needs a "
            "wider dtype"
        )
    exact, stored = (np.asarray(x, np.float64) for x in (weight, stored))
    exact, stored = (x.reshape(num_layers(base), -1) for x in (exact, stored))
    return new, [_sqnr(e, s) for e, s in zip(exact, stored, strict=True)]


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
