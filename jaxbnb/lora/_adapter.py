"""Adapters of a model: added by name, switched, combined, or one for each row."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Int

from jaxbnb.core import QuantConfig
from jaxbnb.lora import _init
from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._layer import (
    DEFAULT,
    AdapterIndex,
    LoraAdapter,
    LoraLinear,
    check_is_matrix,
)
from jaxbnb.lora._targets import (
    Linear,
    adapted,
    adapter_names,
    check_targets,
    linears,
    ranks_of,
)
from jaxbnb.nnx import QuantLinear, _surgery


def add_adapter(
    model: nnx.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT,
    quant: QuantConfig | None = None,
    rngs: nnx.Rngs,
) -> list[str]:
    """Gives the targeted linear layers of ``model`` an adapter, in place.

    They become `LoraLinear`. But for ``init_lora_weights=False`` the model computes the
    same as before until the adapter is trained. Train it, and nothing else, with
    ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)``, or where there are several with
    ``wrt=jaxbnb.lora.adapter_params(name)``. The first adapter of a model is active;
    others wait for `set_adapter`.

    Args:
        model: any NNX model with ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear` layers.
        config: which layers, and how.
        name: of the adapter.
        quant: quantise the adapted ``nnx.Linear`` layers so; what "pissa" and "olora"
            take out of them is taken first, and "loftq" fits the two to each other.
        rngs: its ``params`` stream seeds the adapters, its ``dropout`` stream their
            dropout.

    Returns:
        The dotted paths of the layers that were adapted.

    Raises:
        ValueError: ``config.target_modules`` names no linear layer, or also something
            else; the model has an adapter of this name; or ``config`` and ``quant`` do
            not go with the layers. The model is then as it was.

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
    existing = adapter_names(model)
    _check_new_name(model, name, existing)
    found = linears(model)
    check_targets(model, config, found)
    targets = [
        (linear, ranks) for linear in found if any(ranks := ranks_of(config, linear))
    ]
    if not targets:
        raise ValueError(
            f"target_modules {config.target_modules!r} names none of the linear layers "
            f"of {type(model).__name__}: {[linear.path for linear in found]}"
        )
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
            _surgery.replace(linear.parent, linear.key, done[id(module)])
    return [linear.path for linear, _ in targets]


def set_adapter(model: nnx.Module, names: str | Sequence[str]) -> None:
    """Switches to an adapter, or to the sum of several; to none with ``[]``.

    What is active is part of the model's structure: a compiled function is compiled
    again for it. For adapters that change from batch to batch see `adapter_rows`.

    Raises:
        ValueError: the model has no adapter of a name.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("policy", "reward"):
        ...     _ = jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), name=name,
        ...                                 rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.set_adapter(model, "reward")
        >>> model.layers[0].active
        ('reward',)
    """
    names = _check_names(model, names)
    for each in adapted(model):
        each.layer.active = names


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """Within it the model computes as its base does.

    That is as the base is: "pissa" and "olora" have taken something out of it.

    Raises:
        ValueError: the model has no adapters.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(1))
        >>> with jaxbnb.lora.disable_adapters(model):
        ...     model.layers[0].active
        ()
        >>> model.layers[0].active
        ('default',)
    """
    _check_names(model, [])
    with _restored(model):
        set_adapter(model, [])
        yield


@contextlib.contextmanager
def adapter_rows(
    model: nnx.Module,
    names: Sequence[str],
    adapter_index: Int[Array, " batch"],
) -> Iterator[None]:
    """Within it each row of a batch goes through an adapter of its own, or none.

    One base serves them all in one pass. Each adapter is computed for every row, which
    costs little beside the base. The rows are the first axis of the inputs of every
    adapted layer. The index is a value, not structure: under jit it may change without
    compiling again.

    Args:
        model: a model with adapters.
        names: of adapters.
        adapter_index: of each row, into ``names``; -1 for the base alone.

    Raises:
        ValueError: the model has no adapter of a name, or the index is not of ints, has
            another rank, or points outside ``names`` (where its values are known). A
            layer raises it for inputs with another number of rows.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("policy", "reward"):
        ...     config = jaxbnb.lora.LoraConfig(init_lora_weights=False)
        ...     _ = jaxbnb.lora.add_adapter(model, config, name=name, rngs=nnx.Rngs(1))
        >>> x = jnp.ones((3, 64))
        >>> with jaxbnb.lora.adapter_rows(
        ...     model, ["policy", "reward"], jnp.array([0, 1, -1])):
        ...     y = model(x)
        >>> with jaxbnb.lora.disable_adapters(model):
        ...     bool(jnp.array_equal(y[2], model(x)[2]))
        True

    References:
        ``adapter_names`` of PEFT; Chen et al., Punica: Multi-Tenant LoRA Serving, 2023.
    """
    names = _check_names(model, names)
    index = jnp.asarray(adapter_index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            "adapter_index must have an int for each row of the batch; got "
            f"{index.dtype} of shape {index.shape}"
        )
    if not isinstance(index, Tracer) and index.size:
        low, high = int(jnp.min(index)), int(jnp.max(index))
        if low < -1 or high >= len(names):
            raise ValueError(
                f"adapter_index must be in [-1, {len(names)}), for {list(names)}; got "
                f"{low} to {high}"
            )
    with _restored(model):
        for _, _, layer in adapted(model):
            layer.active = names
            # Every layer of a stack gets its copy, to be scanned over with the rest.
            stack = layer.base.kernel.get_value().shape[:-2]
            rows = jnp.broadcast_to(index, (*stack, *index.shape))
            layer.adapter_index = AdapterIndex(rows)
        yield


def combine_adapters(
    model: nnx.Module, names: Sequence[str], weights: Sequence[float], *, name: str
) -> None:
    """Adds the weighted sum of adapters as a new one, exactly.

    Its factors are theirs side by side, so its rank is the sum of their ranks: PEFT's
    ``combination_type="cat"``. It is one adapter of ``r`` and ``lora_alpha`` alike, the
    weights being in ``lora_a``. It is not active until `set_adapter`.

    Args:
        model: a model with the adapters.
        names: of those to combine.
        weights: one for each, of any sign.
        name: of the new one.

    Raises:
        ValueError: not a finite weight for each name; unknown names, or a ``name`` that
            is taken; or DoRA, whose updates do not add up.

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
    names = _check_names(model, names)
    _check_new_name(model, name, adapter_names(model))
    if len(weights) != len(names) or not names or not np.all(np.isfinite(weights)):
        raise ValueError(
            f"combine_adapters needs a finite weight for each name; got {weights!r} "
            f"for {list(names)}"
        )
    plans: list[tuple[LoraLinear, list[tuple[float, LoraAdapter]]]] = []
    for path, _, layer in adapted(model):
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
    # Its targets are known now; it is saved as any other.
    paths = tuple(each.path for each in adapted(model, name))
    config = dataclasses.replace(config, target_modules=paths)
    for each in adapted(model, name):
        each.layer.adapters[name].config = config


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


def _combine(layer, parts, name, config) -> None:
    """Side by side, zeros up to the rank, scaled and weighted."""
    a = jnp.concatenate(
        [
            weight * adapter.scale[...][..., None, None] * adapter.lora_a[...]
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
        jnp.ones(a.shape[:-2], jnp.float32),
        magnitude=None,
        config=config,
        ranks=(config.r,) * len(parts[0][1].ranks),
        rngs=nnx.Rngs(0),
    )


@contextlib.contextmanager
def _restored(model: nnx.Module) -> Iterator[None]:
    """Puts back afterwards what is active in each layer, and for which rows."""
    layers = [each.layer for each in adapted(model)]
    before = [(layer.active, layer.adapter_index) for layer in layers]
    try:
        yield
    finally:
        for layer, (active, index) in zip(layers, before, strict=True):
            layer.active = active
            layer.adapter_index = nnx.data(index)


def _check_new_name(model: nnx.Module, name: str, existing: list[str]) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a str without dots; got {name!r}")
    if name in existing:
        raise ValueError(
            f"{type(model).__name__} has an adapter {name!r} already; "
            f"its adapters are {existing}, give another name"
        )


def _check_names(model: nnx.Module, names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    existing = adapter_names(model)
    unknown = [name for name in names if name not in existing]
    if unknown or not existing:
        raise ValueError(
            f"{type(model).__name__} has the adapters {existing}; got {list(names)}; "
            "add_adapter adds one"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"each adapter once; got {list(names)}")
    return names


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
        raise ValueError(
            f"init_lora_weights={init!r} and quant={quant} change the weights that "
            f"the adapters {existing} were made for; give it as the first adapter"
        )
    if init == "loftq" and quant is None:
        raise ValueError(
            "init_lora_weights='loftq' fits adapter and quantised weight to each "
            "other; give the format as quant, and the model unquantised"
        )
    for linear, ranks in targets:
        base = linear.module
        base = base.base if isinstance(base, LoraLinear) else base
        if quant is not None and isinstance(base, QuantLinear):
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
        if init in FROM_WEIGHT:
            _init.check_rank(max(ranks), base.kernel.get_value().shape, str(init))
