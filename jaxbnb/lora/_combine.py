"""combine_adapters: adds a weighted sum of adapters as a new one."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._factors import LoraAdapter
from jaxbnb.lora._init import expand_axes
from jaxbnb.lora._layer import LoraLayer, LoraLinear
from jaxbnb.lora._targets import (
    adapter_names,
    check_names,
    check_new_name,
    find_adapted,
    find_modules,
)


def combine_adapters(
    model: nnx.Module, names: Sequence[str], weights: Sequence[float], *, name: str
) -> None:
    """Adds the exact weighted sum of adapters as a new adapter.

    The new factors are the old ones side by side, so the rank is the sum of the ranks,
    like PEFT's ``combination_type="cat"``. The weights go into ``lora_a``, and
    ``lora_alpha`` equals ``r``. The adapter is not active until `set_adapter`.

    Args:
        model: a model with the adapters.
        names: names of the adapters to combine.
        weights: a weight of any sign for each.
        name: name of the new adapter.

    Raises:
        ValueError: there is not a finite weight for each name; a name is unknown, or
            ``name`` is taken; or an adapter uses DoRA or trains more than factors, and
            its update cannot be added.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("helpful", "brief"):
        ...     _ = jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), name=name,
        ...                                 rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.combine_adapters(
        ...     model, ["helpful", "brief"], [0.7, 0.3], name="both")
        >>> model.layers[0].adapters["both"].lora_a.shape
        (64, 16)
    """
    names = check_names(model, names)
    check_new_name(model, name, adapter_names(model))
    if len(weights) != len(names) or not names or not np.all(np.isfinite(weights)):
        raise ValueError(
            f"combine_adapters needs a finite weight for each name; got {weights!r} "
            f"for {list(names)}"
        )
    for path, module in find_modules(model):
        biases = module.biases if isinstance(module, LoraLinear) else {}
        for part in names:
            is_more = part in module.names and not isinstance(
                module.adapters.get(part), LoraAdapter
            )
            if is_more or part in biases:
                raise ValueError(
                    f"the adapter {part!r} trains more than factors of {path}; merge "
                    "it instead"
                )
    plans: list[tuple[LoraLayer, list[tuple[float, LoraAdapter]]]] = []
    for path, _, layer in find_adapted(model):
        parts = [
            (weight, layer.adapters[part])
            for weight, part in zip(weights, names, strict=True)
            if part in layer.adapters
        ]
        if any(adapter.magnitude is not None for _, adapter in parts):
            raise ValueError(
                f"{path} has a DoRA adapter among {list(names)}, which scales "
                "the weight too; merge it instead"
            )
        if parts:
            plans.append((layer, parts))
    rank = max(sum(a.lora_a.shape[-1] for _, a in parts) for _, parts in plans)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=("",))
    for layer, parts in plans:
        _combine(layer, parts, name, config)
    # The targets are known only now. With them, it is saved like any other adapter.
    paths = tuple(each.path for each in find_adapted(model, name))
    config = dataclasses.replace(config, target_modules=paths)
    for each in find_adapted(model, name):
        each.layer.adapters[name].config = config


def _combine(layer, parts, name, config) -> None:
    """Puts scaled and weighted factors side by side, padded with zeros to the rank."""
    a = jnp.concatenate(
        [
            weight
            * expand_axes(adapter.scale[...], adapter.lora_a.ndim)
            * adapter.lora_a
            for weight, adapter in parts
        ],
        axis=-1,
    )
    b = jnp.concatenate([adapter.lora_b[...] for _, adapter in parts], axis=-2)
    pad = [(0, 0)] * (a.ndim - 2)
    short = config.r - a.shape[-1]
    layer.adapters[name] = LoraAdapter(
        jnp.pad(a, [*pad, (0, 0), (0, short)]),
        jnp.pad(b, [*pad, (0, short), (0, 0)]),
        jnp.ones_like(parts[0][1].scale[...]),
        magnitude=None,
        config=config,
        ranks=(config.r,) * len(parts[0][1].ranks),
        rngs=nnx.Rngs(0),
    )
