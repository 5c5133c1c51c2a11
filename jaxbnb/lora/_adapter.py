"""add_adapter: gives the layers of a model an adapter."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.lora import _init
from jaxbnb.lora._base import Embedding, Quantized, check_is_matrix, get_axes, get_bias
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._embed import LoraEmbed
from jaxbnb.lora._layer import DEFAULT, LoraLayer, LoraLinear
from jaxbnb.lora._more import (
    Saved,
    find_biased,
    find_saved,
    find_tokens,
    needs_own_head,
)
from jaxbnb.lora._targets import (
    Linear,
    adapter_names,
    check_new_name,
    check_targets,
    find_linears,
    find_modules,
    get_ranks,
    untie_head_if,
)
from jaxbnb.lora._tokens import TrainedTokens
from jaxbnb.lora._trained import TrainedModule
from jaxbnb.nnx import surgery
from jaxbnb.sharding import find_mesh, place_rest
from jaxbnb.sharding.axis_types import change_in_place


def add_adapter(
    model: nnx.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT,
    quant: QuantConfig | str | None = None,
    rngs: nnx.Rngs,
) -> list[str]:
    """Gives the targeted layers of ``model`` an adapter, in place.

    Linear layers become `LoraLinear`, embeddings `LoraEmbed`, and what else ``config``
    says to train becomes part of the adapter too. Except for
    ``init_lora_weights=False``, the model computes the same as before until the adapter
    is trained. For a model on a mesh, `jaxbnb.sharding` says how the adapter is
    divided. To train the adapter and nothing else, use
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)``. If there are several, use
    ``wrt=jaxbnb.lora.adapter_params(name)``, because weight decay shrinks everything
    that ``wrt`` selects, active or not. The first adapter of a model is active; others
    wait for `set_adapter`.

    Args:
        model: any NNX model with ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum``,
            ``nnx.Embed`` or their quantised counterparts in `jaxbnb.nnx`.
        config: the layers to adapt, and how.
        name: name of the adapter.
        quant: format to quantise the adapted layers to, a `jaxbnb.QuantConfig` or the
            name of a format; None for no quantisation. "pissa" and "olora" first take
            their part out of the weights; "loftq" fits adapter and weights to each
            other.
        rngs: random streams; ``params`` seeds the adapters, ``dropout`` their dropout.

    Returns:
        The dotted paths of the layers that were adapted.

    Raises:
        ValueError: ``config`` names no layer, or anything that is not in the model or
            cannot be trained; the model has an adapter of this name; or ``config`` and
            ``quant`` do not suit the layers. The model is then unchanged.
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
    with change_in_place(model, rngs):
        with untie_head_if(model, needs_own_head(model, config)):
            adapted = _add(model, config, name, quant, rngs)
        _place(model)
    return adapted


def _place(model: nnx.Module) -> None:
    """Puts what is new in a model on the mesh that the model is on, if it is on one."""
    mesh = find_mesh(model)
    if mesh is None:
        return
    new = nnx.filter_state(nnx.state(model), _is_off_mesh)
    nnx.update(model, place_rest(new, mesh))


def _is_off_mesh(path: Any, variable: Any) -> bool:
    del path
    leaves = jax.tree.leaves(variable)
    return not any(isinstance(x.sharding, NamedSharding) for x in leaves)


def _check_types(config: Any, rngs: Any) -> None:
    if not isinstance(config, LoraConfig):
        got = f"{type(config).__module__.split('.')[0]}.{type(config).__name__}"
        raise TypeError(
            f"config must be a jaxbnb.lora.LoraConfig, which has PEFT's field names; "
            f"got {got}"
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
    found = find_linears(model)
    check_targets(model, config, found)
    saved = find_saved(model, config)
    targets = [
        (linear, ranks) for linear in found if any(ranks := get_ranks(config, linear))
    ]
    if not targets:
        raise ValueError(_explain_no_targets(model, config, found))
    _check(config, quant, targets, existing)
    adapted = [linear for linear, _ in targets]
    tokens = find_tokens(model, config, found, adapted)
    biased, others = find_biased(model, config, found, adapted)
    active = next((module.active for _, module in find_modules(model)), (name,))

    layers = _Layers(active, rngs)
    for linear, ranks in targets:
        names = [(each, linear.path) for each in linear.names]
        layer = layers.wrap(linear)
        if name not in layer.adapters:
            layer.add(
                config, name=name, rngs=rngs, quant=quant, names=names, ranks=ranks
            )
    for linear, ids in tokens:
        layer = layers.wrap(linear)
        layer.adapters[name] = TrainedTokens(layer.base, ids)
    for linear in biased:
        layer = layers.wrap(linear)
        assert isinstance(layer, LoraLinear)
        layer.add_bias(name)
    for place in saved:
        _train_in_full(place, name, active)
    for place in others:
        _train_in_full(place, name, active, only_bias=True)
    return [linear.path for linear in adapted]


class _Layers:
    """The layers that have become adaptable; one that is in two places is the same."""

    def __init__(self, active: tuple[str, ...], rngs: nnx.Rngs):
        self.active = active
        self.rngs = rngs
        self.wrapped: dict[int, LoraLayer] = {}

    def wrap(self, linear: Linear) -> LoraLayer:
        """Puts a layer with room for adapters in the place of a layer."""
        module = linear.module
        if isinstance(module, LoraLayer):
            return module
        if id(module) not in self.wrapped:
            layer: Any = (
                LoraEmbed(module, self.active)
                if isinstance(module, Embedding)
                else LoraLinear(module, rngs=self.rngs)
            )
            layer.active = self.active
            self.wrapped[id(module)] = layer
        layer = self.wrapped[id(module)]
        surgery.replace_child(linear.parent, linear.key, layer)
        return layer


def _train_in_full(
    place: Saved, name: str, active: tuple[str, ...], *, only_bias: bool = False
) -> None:
    """Gives a module a trained copy for this adapter."""
    module = place.module
    if not isinstance(module, TrainedModule):
        module = TrainedModule(place.module, active, place.stack)
        surgery.replace_child(place.parent, place.key, module)
    module.add(name, only_bias=only_bias, is_head=place.is_head)


def _explain_no_targets(
    model: nnx.Module, config: LoraConfig, found: list[Linear]
) -> str:
    """Explains why no layer is a target although every name in the config is known."""
    free = dataclasses.replace(config, exclude_modules=None)
    if named := [linear.path for linear in found if any(get_ranks(free, linear))]:
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
    """Returns an NNX filter for one adapter's parameters, for ``wrt`` or ``nnx.state``.

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
    parts = (_Within((where, name)) for where in ("adapters", "biases"))
    return nnx.All(nnx.LoRAParam, nnx.Any(*parts))


@dataclasses.dataclass(frozen=True)
class _Within:
    """An NNX filter for paths that contain these parts in a row."""

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
    """Raises ValueError for what does not fit, before the first layer is changed."""
    init = config.init_lora_weights
    changes_base = init in FROM_WEIGHT or quant is not None
    if changes_base and existing:
        quant_type = quant and quant.quant_type
        raise ValueError(
            f"init_lora_weights={init!r} and quant={quant_type!r} change the weights "
            f"that the adapters {existing} were made for; add this adapter first"
        )
    if init == "loftq" and quant is None:
        raise ValueError(
            "init_lora_weights='loftq' fits adapter and quantised weight to each "
            "other; give the format as quant, and the model unquantised"
        )
    for linear, ranks in targets:
        base = linear.base
        if isinstance(base, Embedding) and init in FROM_WEIGHT:
            raise ValueError(
                f"{linear.path} is an embedding, whose adapter cannot start from its "
                f"weight; got init_lora_weights={init!r}"
            )
        if config.bias == "lora_only" and 0 in ranks and get_bias(base) is not None:
            raise ValueError(
                f"bias='lora_only' trains the biases of all layers of a stack; "
                f"target_modules {config.target_modules!r} leaves out some of "
                f"{linear.path}"
            )
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
            shape = get_axes(base).matrix_shape
        except ValueError as error:
            raise ValueError(f"{linear.path}: {error}") from error
        if init in FROM_WEIGHT:
            _init.check_rank(max(ranks), shape, str(init))
