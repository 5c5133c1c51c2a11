"""merge and unmerge: put adapters into the weights, and take them out again."""

import dataclasses
import math
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxbnb.lora._base import (
    Base,
    check_is_matrix,
    get_bias,
    get_param,
    get_weight,
    num_layers,
    store_like,
)
from jaxbnb.lora._embed import LoraEmbed
from jaxbnb.lora._factors import LoraAdapter
from jaxbnb.lora._layer import LoraLayer, LoraLinear
from jaxbnb.lora._more import find_embedding
from jaxbnb.lora._switch import AdaptedModule
from jaxbnb.lora._targets import (
    find_adapted,
    find_linears,
    find_modules,
    find_tied_head,
)
from jaxbnb.lora._trained import TrainedModule
from jaxbnb.nnx import surgery
from jaxbnb.sharding import place_like
from jaxbnb.sharding.axis_types import change_in_place

# Share of an update below which most of it is lost.
_LOST: Final = 0.5


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of `merge`, which `unmerge` needs.

    Attributes:
        sqnr: signal-to-noise ratio, by layer, of storing the sum in the weight's
            format, in dB: 10 log10 of the sum of squares over that of the errors.
            Infinite if nothing was rounded.
        kept: share of the update, by layer, that is left after rounding: how far the
            weights have moved along the update, as a part of its length. 1 if nothing
            was rounded. In 4 bits, it is near 0 for a small update, because most codes
            stay the same.
        originals: the original modules, by path.
    """

    sqnr: dict[str, float]
    kept: dict[str, float]
    originals: dict[str, AdaptedModule]

    def measure(self, model: nnx.Module) -> "Merged":
        """Measures the merged weights again, e.g. after `jaxbnb.calibrate`.

        Args:
            model: the merged model. Its layers may have been quantised since.

        Returns:
            The ``sqnr`` and ``kept`` of the weights that it has now, and the same
            ``originals``.

        Raises:
            ValueError: the model does not have these layers.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
            >>> config = jaxbnb.lora.LoraConfig(init_lora_weights=False)
            >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
            >>> merged = jaxbnb.lora.merge(model)
            >>> _ = jaxbnb.nnx.quantize_model(model, "int8")
            >>> 0.9 < merged.measure(model).kept["layers.0"] < 1.1
            True
        """
        sqnr: dict[str, float] = {}
        kept: dict[str, float] = {}
        linears = {linear.path: linear for linear in find_linears(model)}
        for path, original in self.originals.items():
            if not isinstance(original, LoraLayer):
                continue
            linear = linears.get(path)
            there = None if linear is None else linear.module
            if linear is None or _shapes(there) != _shapes(original.base):
                raise ValueError(
                    f"{type(model).__name__} has no merged layer at {path}; give the "
                    "model that was merged"
                )
            stored = get_weight(cast(Base, there))
            ratios, shares = _measure_layer(original, *_add_changes(original), stored)
            sqnr.update(zip(linear.names, ratios, strict=True))
            kept.update(zip(linear.names, shares, strict=True))
        return Merged(sqnr, kept, self.originals)

    def __str__(self) -> str:
        if not self.sqnr:
            return f"merged {len(self.originals)} modules"
        worst = min(self.sqnr, key=self.sqnr.__getitem__)
        least = min(self.kept, key=self.kept.__getitem__)
        is_lost = self.kept[least] < _LOST
        hint = "; jaxbnb.calibration.merge_calibrated keeps more" if is_lost else ""
        return (
            f"merged {len(self.sqnr)} layers; the lowest SQNR is "
            f"{self.sqnr[worst]:.2f} dB, of {worst}; the update is kept least, "
            f"{self.kept[least]:.0%}, in {least}{hint}"
        )


def merge(model: nnx.Module) -> Merged:
    """Merges the active adapters into the weights of plain layers, in place.

    Trained biases and copies of modules take the place of the base's; copies in the
    dtype of the base, but not quantised.

    A quantised weight is decoded, updated, and quantised again in its format. That
    costs precision, unlike a separate adapter. A small update is lost in NF4, because
    nearly every element is rounded back to the level it had: ``kept`` says how much of
    the update is left, and ``sqnr`` how exact the sum is. To keep it in 4 bits, call
    `jaxbnb.calibration.merge_calibrated` with text. Or merge after
    `jaxbnb.nnx.dequantize_model`, and then quantise to 8 bits.

    Args:
        model: a model with adapters.

    Returns:
        A `Merged`. It holds the original layers; drop it to free their memory.

    Raises:
        ValueError: no adapter is active, a sum is not finite, or the embedding changes
            but not the head that it is, too. The model is then unchanged.

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
    with change_in_place(model):
        return _merge(model)


def _merge(model: nnx.Module) -> Merged:
    _check_head(model)
    sqnr: dict[str, float] = {}
    kept: dict[str, float] = {}
    plain: dict[int, nnx.Module] = {}
    for path, names, layer in find_adapted(model):
        plain[id(layer)] = layer.base
        if not set(layer.active).isdisjoint(layer.names):
            plain[id(layer)], ratios, shares = _merge_layer(path, layer)
            sqnr.update(zip(names, ratios, strict=True))
            kept.update(zip(names, shares, strict=True))
    found = list(find_modules(model))
    if all(set(module.active).isdisjoint(module.names) for _, module in found):
        raise ValueError(
            f"{type(model).__name__} has no active adapters to merge; "
            "add_adapter adds one, set_adapter activates it"
        )
    for _, module in found:
        if isinstance(module, TrainedModule):
            plain[id(module)] = _merge_copy(module)
    originals: dict[str, AdaptedModule] = {}
    for path, parent, key, module in list(surgery.iter_children(model)):
        if isinstance(module, AdaptedModule):
            originals[path] = module
            surgery.replace_child(parent, key, plain[id(module)])
    return Merged(sqnr, kept, originals)


def _check_head(model: nnx.Module) -> None:
    """Raises ValueError if merging would change a tied head that is not trained."""
    if not find_tied_head(model):
        return
    embedding = find_embedding(model)
    for path, module in find_modules(model):
        chosen = [name for name in module.active if name in module.names]
        if isinstance(module, LoraEmbed):
            adapters = [module.adapters[name] for name in chosen]
            is_apart = any(isinstance(each, LoraAdapter) for each in adapters)
        else:
            heads = module.heads if isinstance(module, TrainedModule) else ()
            is_apart = not set(chosen) <= set(heads)
        if path == embedding and is_apart:
            raise ValueError(
                f"{path} is the head of {type(model).__name__} too, and {chosen} "
                "change only what is looked up; call model.untie_head() before merging"
            )


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
    places = {
        path: (parent, key, module)
        for path, parent, key, module in surgery.iter_children(model)
    }
    for path, original in merged.originals.items():
        there = places[path][2] if path in places else None
        if isinstance(there, AdaptedModule) or _shapes(there) != _shapes(original.base):
            got = "nothing" if there is None else type(there).__name__
            raise ValueError(
                f"unmerge puts a module with variables {_shapes(original.base)} back "
                f"at {path}; {type(model).__name__} has {got} there: give what was "
                "merged"
            )
    with change_in_place(model):
        for path, original in merged.originals.items():
            parent, key, _ = places[path]
            surgery.replace_child(parent, key, original)


def _shapes(module: Any) -> dict[str, tuple[int, ...]] | None:
    """Returns the shapes of a module's variables, before quantisation."""
    if not isinstance(module, nnx.Module):
        return None
    state = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): tuple(v.shape) for path, v in state}


def _merge_copy(module: TrainedModule) -> nnx.Module:
    """Returns a plain module with the values of the active copy, or the base."""
    copy = module.module
    if copy is module.base:
        return copy
    # New variables, because the copy is put back by unmerge.
    graphdef, state = nnx.split(copy)
    merged = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    olds: dict[Any, Any] = dict(nnx.to_flat_state(nnx.state(module.base)))
    for path, part in list(nnx.iter_modules(merged)):
        for name, variable in list(vars(part).items()):
            if isinstance(variable, nnx.LoRAParam):
                old = olds[(*path, name)]
                value: Any = variable.get_value().astype(old.get_value().dtype)
                is_plain = isinstance(old, nnx.Param)
                new = old.replace(value) if is_plain else nnx.Param(value)
                setattr(part, name, new)
    return merged


def _merge_layer(path: str, layer: LoraLayer) -> tuple[Base, list[float], list[float]]:
    """Returns a layer with the sum as its weight; SQNR and share kept of its stack."""
    base = layer.base
    check_is_matrix(base)
    before, weight = _add_changes(layer)
    # tree_map makes new variables, which share the arrays.
    graphdef, state = nnx.split(base)
    merged = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    kernel: Any = get_param(merged)
    if not set(layer.active).isdisjoint(layer.adapters):
        stored: Any = store_like(base, weight)
        # XLA may have divided the sum in another way.
        kernel.set_value(place_like(stored, kernel.get_value()))
    _merge_bias(layer, merged)
    stored = get_weight(merged)
    if not bool(jnp.all(jnp.isfinite(stored))):
        raise ValueError(
            f"{path}: the weight with {layer.active} added is not finite as "
            f"{kernel.get_value().dtype}; its adapter has diverged, or it needs a "
            "wider dtype"
        )
    return merged, *_measure_layer(layer, before, weight, stored)


def _add_changes(layer: LoraLayer) -> tuple[Array, Array]:
    """Returns the weight of a layer's base, and the sum with the active adapters."""
    before = weight = get_weight(layer.base)
    chosen = [layer.adapters[name] for name in layer.active if name in layer.adapters]
    for change in [adapter.change(before) for adapter in chosen]:
        weight = weight + change
    return before, weight


def _measure_layer(
    layer: LoraLayer, before: Array, exact: Array, stored: Array
) -> tuple[list[float], list[float]]:
    """Returns SQNR and share kept of each layer in a stack."""
    arrays = [
        np.asarray(x, np.float64).reshape(num_layers(layer.base), -1)
        for x in (before, exact, stored)
    ]
    return (
        [_sqnr(e, s) for _, e, s in zip(*arrays, strict=True)],
        [_kept(*each) for each in zip(*arrays, strict=True)],
    )


def _merge_bias(layer: LoraLayer, merged: Base) -> None:
    """Adds the change of each active adapter to the bias of the merged layer."""
    bias = get_bias(merged)
    if not isinstance(layer, LoraLinear) or bias is None:
        return
    changes = [layer.bias_change(name) for name in layer.active]
    total = bias[...].astype(jnp.float32)
    total = sum((change for change in changes if change is not None), total)
    bias.set_value(total.astype(bias[...].dtype))


def _kept(before: np.ndarray, exact: np.ndarray, stored: np.ndarray) -> float:
    """Returns the share of an update that rounding left; 1 for no update."""
    update = exact - before
    power = float(np.vdot(update, update))
    return float(np.vdot(stored - before, update)) / power if power else 1.0


def _sqnr(exact: np.ndarray, stored: np.ndarray) -> float:
    noise = float(np.sum((exact - stored) ** 2))
    signal = float(np.sum(exact**2))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
