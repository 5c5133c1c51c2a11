"""add_adapter: gives the linear layers of a model an adapter."""

import dataclasses
from typing import Any

from flax import nnx

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.lora import _init
from jaxbnb.lora._base import Quantized, axes_of, check_is_matrix
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._layer import DEFAULT, LoraLinear
from jaxbnb.lora._targets import (
    Linear,
    adapter_names,
    check_new_name,
    check_targets,
    head_name,
    linears,
    own_head,
    ranks_of,
)
from jaxbnb.nnx import surgery


def add_adapter(
    model: nnx.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT,
    quant: QuantConfig | str | None = None,
    rngs: nnx.Rngs,
) -> list[str]:
    """Gives the targeted linear layers of ``model`` an adapter, in place.

    They become `LoraLinear`. But for ``init_lora_weights=False`` the model computes the
    same as before until the adapter is trained. Train it, and nothing else, with
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)``, or where there are several with
    ``wrt=jaxbnb.lora.adapter_params(name)``: weight decay shrinks what is selected,
    active or not. The first adapter of a model is active; others wait for
    `set_adapter`.

    Args:
        model: any NNX model with ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``
            or their quantised counterparts of `jaxbnb.nnx`.
        config: which layers, and how.
        name: of the adapter.
        quant: format to quantise the adapted layers to, a `jaxbnb.QuantConfig` or a
            format's name; "pissa" and "olora" first take their part out of the weights,
            and "loftq" fits the two to each other.
        rngs: its ``params`` stream seeds the adapters, its ``dropout`` stream their
            dropout.

    Returns:
        The dotted paths of the layers that were adapted.

    Raises:
        ValueError: ``config.target_modules`` names no linear layer, or also something
            else; the model has an adapter of this name; or ``config`` and ``quant`` do
            not go with the layers. The model is then as it was.
        TypeError: ``config`` is not a `LoraConfig`, or ``rngs`` not an ``nnx.Rngs``.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(1))
        ['layers.0']
        >>> gaussian = jaxbnb.lora.LoraConfig(r=2, init_lora_weights="gaussian")
        >>> jaxbnb.lora.add_adapter(model, gaussian, name="reward", rngs=nnx.Rngs(2))
        ['layers.0']
        >>> jaxbnb.lora.adapter_names(model)
        ['default', 'reward']
    """
    _check_types(config, rngs)
    quant = None if quant is None else as_config(quant)
    with own_head(model, any(config.targets(name) for name in head_name(model))):
        return _add(model, config, name, quant, rngs)


def _check_types(config: Any, rngs: Any) -> None:
    if not isinstance(config, LoraConfig):
        got = f"{type(config).__module__.split('.')[0]}.{type(config).__name__}"
        raise TypeError(
            f"config must be a jaxbnb.lora.LoraConfig, which has the names of PEFT's "
            f"fields; got {got}"
        )
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs must be nnx.Rngs, e.g. nnx.Rngs(0); got {type(rngs).__name__}"
        )


def _add(
    model: nnx.Module,
    config: LoraConfig,
    name: str,
    quant: QuantConfig | None,
    rngs: nnx.Rngs,
) -> list[str]:
    existing = adapter_names(model)
    check_new_name(model, name, existing)
    found = linears(model)
    check_targets(model, config, found)
    targets = [
        (linear, ranks) for linear in found if any(ranks := ranks_of(config, linear))
    ]
    if not targets:
        raise ValueError(_nothing_left(model, config, found))
    _check(config, quant, targets, existing)
    active = (name,)
    if existing:
        layers = (linear.module for linear in found)
        active = next(m.active for m in layers if isinstance(m, LoraLinear))
    done: dict[int, LoraLinear] = {}
    for linear, ranks in targets:
        module = linear.module
        if id(module) not in done:
            layer = module
            if not isinstance(layer, LoraLinear):
                layer = LoraLinear(layer, rngs=rngs)
                layer.active = active
            names = [(each, linear.path) for each in linear.names]
            layer.add(
                config, name=name, rngs=rngs, quant=quant, names=names, ranks=ranks
            )
            done[id(module)] = layer
        if not isinstance(module, LoraLinear):
            surgery.replace(linear.parent, linear.key, done[id(module)])
    return [linear.path for linear, _ in targets]


def _nothing_left(model: nnx.Module, config: LoraConfig, found: list[Linear]) -> str:
    """Why no layer is a target, although each name in the config means something."""
    free = dataclasses.replace(config, exclude_modules=None)
    if named := [linear.path for linear in found if any(ranks_of(free, linear))]:
        return (
            f"exclude_modules {config.exclude_modules!r} excludes every layer that "
            f"target_modules {config.target_modules!r} names: {named}"
        )
    return (
        f"target_modules {config.target_modules!r} names none of the linear layers "
        f"of {type(model).__name__}: {[linear.path for linear in found]}; "
        f"layers_to_transform is {config.layers_to_transform!r}"
    )


def adapter_params(name: str) -> Any:
    """The filter of one adapter's parameters, for ``wrt`` or ``nnx.state``.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("policy", "reward"):
        ...     _ = jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), name=name,
        ...                                 rngs=nnx.Rngs(1))
        >>> state = nnx.state(model, jaxbnb.lora.adapter_params("policy"))
        >>> [path[-2:] for path, _ in nnx.to_flat_state(state)]
        [('policy', 'lora_a'), ('policy', 'lora_b')]
    """
    return nnx.All(nnx.LoRAParam, _Within(("adapters", name)))


@dataclasses.dataclass(frozen=True)
class _Within:
    """A filter of NNX: paths with these parts in a row."""

    parts: tuple[str, ...]

    def __call__(self, path, value) -> bool:
        n = len(self.parts)
        return any(
            tuple(path[i : i + n]) == self.parts for i in range(len(path) - n + 1)
        )


def _check(
    config: LoraConfig,
    quant: QuantConfig | None,
    targets: list[tuple[Linear, tuple[int, ...]]],
    existing: list[str],
) -> None:
    """What must be known before the first layer is changed."""
    init = config.init_lora_weights
    changes_base = init in FROM_WEIGHT or quant is not None
    if changes_base and existing:
        quant_type = quant and quant.quant_type
        raise ValueError(
            f"init_lora_weights={init!r} and quant={quant_type!r} change the weights "
            f"that the adapters {existing} were made for; give it as the first adapter"
        )
    if init == "loftq" and quant is None:
        raise ValueError(
            "init_lora_weights='loftq' fits adapter and quantised weight to each "
            "other; give the format as quant, and the model unquantised"
        )
    for linear, ranks in targets:
        base = linear.module
        base = base.base if isinstance(base, LoraLinear) else base
        if quant is not None and isinstance(base, Quantized):
            raise ValueError(
                f"{linear.path} is quantised already, {base.config}; leave quant out, "
                "or give the model unquantised"
            )
        if config.use_dora and 0 in ranks:
            raise ValueError(
                f"use_dora adapts all layers of a stack; target_modules "
                f"{config.target_modules!r} leaves out some of {linear.path}"
            )
        if changes_base or config.use_dora:
            check_is_matrix(base)
        try:
            shape = axes_of(base).matrix_shape
        except ValueError as error:
            raise ValueError(f"{linear.path}: {error}") from error
        if init in FROM_WEIGHT:
            _init.check_rank(max(ranks), shape, str(init))
