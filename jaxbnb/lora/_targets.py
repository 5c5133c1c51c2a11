"""Finds the layers of a model by name; those of a stack have a name each."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from jaxbnb.core.paths import matches
from jaxbnb.lora._base import Base, Embedding, num_layers
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._factors import LoraAdapter
from jaxbnb.lora._layer import LoraLayer
from jaxbnb.lora._switch import AdaptedModule
from jaxbnb.nnx import LayerStack, surgery


class Linear(NamedTuple):
    """A linear layer, a stack of them, or an embedding, with or without adapters.

    Attributes:
        path: dotted path of the layer.
        names: PEFT's name for each layer of the stack.
        module: the layer.
        parent: module that holds it.
        key: its attribute or index there.
    """

    path: str
    names: tuple[str, ...]
    module: Base | LoraLayer
    parent: nnx.Module
    key: Any

    @property
    def base(self) -> Base:
        """The layer without adapters."""
        return self.module.base if isinstance(self.module, LoraLayer) else self.module


class Adapted(NamedTuple):
    """A layer with adapters; fields as in `Linear`."""

    path: str
    names: tuple[str, ...]
    layer: LoraLayer


def find_linears(model: nnx.Module) -> list[Linear]:
    """Finds every linear layer and embedding, once for each place that holds it.

    What is trained in full is left out, together with its copies.
    """
    below = list(surgery.iter_children(model))
    stacks = find_stacks(model)
    inside = tuple(
        f"{path}." for path, _, _, module in below if isinstance(module, AdaptedModule)
    )
    found: list[Linear] = []
    for path, parent, key, module in below:
        if path.startswith(inside):
            continue
        if isinstance(module, Base | LoraLayer):
            names, _ = number(path, stacks)
            base = module.base if isinstance(module, LoraLayer) else module
            count = num_layers(base)
            # Layers that are not stacked by a LayerStack do not have numbers.
            names = names if len(names) == count else (path,) * count
            found.append(Linear(path, names, module, parent, key))
    return found


def find_adapted(model: nnx.Module, name: str | None = None) -> Iterator[Adapted]:
    """Yields each layer that has adapters, or factors of this adapter, once."""
    seen: set[int] = set()
    for linear in find_linears(model):
        layer = linear.module
        if not isinstance(layer, LoraLayer) or id(layer) in seen:
            continue
        seen.add(id(layer))
        if name is None or isinstance(layer.adapters.get(name), LoraAdapter):
            yield Adapted(linear.path, linear.names, layer)


def find_modules(model: nnx.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Yields each module with adapters, whatever they train, once, and its path."""
    seen: set[int] = set()
    for path, _, _, module in surgery.iter_children(model):
        if isinstance(module, AdaptedModule) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def adapter_names(model: nnx.Module) -> list[str]:
    """Lists the names of a model's adapters.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> jaxbnb.lora.adapter_names(model)
        []
    """
    names: dict[str, None] = {}
    for _, module in find_modules(model):
        names.update(dict.fromkeys(module.names))
    return list(names)


def get_ranks(config: LoraConfig, linear: Linear) -> tuple[int, ...]:
    """Returns the rank of each layer of a stack; 0 if it is not a target."""
    path = linear.path
    if config.target_modules == "all-linear" and isinstance(linear.base, Embedding):
        return (0,) * len(linear.names)
    return tuple(
        config.rank_of(name, path) if config.targets(name, path) else 0
        for name in linear.names
    )


@runtime_checkable
class TiesHead(Protocol):
    """A model that may use its embedding as output head; ``lm_head`` is then None."""

    lm_head: Any
    config: Any

    def untie_head(self) -> None:
        """Gives the model a separate head that computes the same."""
        ...


def find_tied_head(model: nnx.Module) -> tuple[str, ...]:
    """Returns the name of the head that a tied model lacks; empty if it has a head."""
    is_tied = isinstance(model, TiesHead) and model.lm_head is None
    return ("lm_head",) if is_tied else ()


@contextlib.contextmanager
def untie_head_if(model: nnx.Module, is_wanted: bool) -> Iterator[None]:
    """Gives a tied model a separate head, if wanted, and undoes that on an error."""
    if not is_wanted or not isinstance(model, TiesHead) or model.lm_head is not None:
        yield
        return
    config = model.config
    model.untie_head()
    try:
        yield
    except BaseException:
        model.lm_head, model.config = nnx.data(None), config
        raise


def check_targets(model: nnx.Module, config: LoraConfig, found: list[Linear]) -> None:
    """Checks that every target names a linear layer, and every exclusion a module.

    Raises:
        ValueError: a name means something else, or nothing.
    """
    _check_excluded(model, config, found)
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else targets
    paths = [name for linear in found for name in (linear.path, *linear.names)]
    for name in names:
        pattern = name if isinstance(targets, str) else [name]
        if name == "all-linear" or any(matches(path, pattern) for path in paths):
            continue
        others = {
            path: type(module).__name__
            for path, _, _, module in surgery.iter_children(model)
            if isinstance(module, nnx.Module) and matches(path, pattern)
        }
        if others:
            raise ValueError(
                f"target_modules {name!r} means {others}, and adapters are for linear "
                f"layers and embeddings: {[linear.path for linear in found]}; "
                "modules_to_save trains any module in full"
            )
        raise ValueError(
            f"target_modules {name!r} names none of the linear layers of "
            f"{type(model).__name__}: {[linear.path for linear in found]}"
            + (
                "; a string is a regular expression of the whole path, so give names "
                f"as a list: [{name!r}]"
                if isinstance(targets, str)
                else ""
            )
        )


def _check_excluded(model: nnx.Module, config: LoraConfig, found: list[Linear]) -> None:
    excluded = config.exclude_modules
    paths = [path for path, _, _, _ in surgery.iter_children(model)]
    paths += [name for linear in found for name in linear.names]
    paths += find_tied_head(model)
    for name in [excluded] if isinstance(excluded, str) else excluded or ():
        pattern = name if isinstance(excluded, str) else [name]
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(
                f"exclude_modules {name!r} names nothing in {type(model).__name__}; "
                f"its linear layers are {[linear.path for linear in found]}"
            )


def check_new_name(model: nnx.Module, name: str, existing: list[str]) -> None:
    """Checks the name of a new adapter, which becomes part of its parameters' paths.

    Raises:
        ValueError: it cannot be part of a path, or ``existing`` contains it.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a str without dots; got {name!r}")
    if name in existing:
        raise ValueError(
            f"{type(model).__name__} has an adapter {name!r} already; "
            f"its adapters are {existing}, give another name"
        )


def check_names(model: nnx.Module, names: str | Sequence[str]) -> tuple[str, ...]:
    """Returns one name of an adapter, or several, as a tuple.

    Raises:
        ValueError: the model lacks one of them, or a name is repeated.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    existing = adapter_names(model)
    unknown = [name for name in names if name not in existing]
    if unknown or not existing:
        raise ValueError(
            f"{type(model).__name__} has the adapters {existing}; got {list(names)}; "
            "add_adapter adds one"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"name each adapter once; got {list(names)}")
    return names


def find_stacks(model: nnx.Module) -> dict[str, int]:
    """Returns the number of layers of each `LayerStack`, by its path."""
    stacks = {"": model.num_layers} if isinstance(model, LayerStack) else {}
    for path, _, _, module in surgery.iter_children(model):
        if isinstance(module, LayerStack):
            stacks[path] = module.num_layers
    return stacks


def number(
    path: str, stacks: dict[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Numbers a module's path for each layer of its stack, or of nested stacks.

    Args:
        path: dotted path of the module.
        stacks: number of layers of each stack, by its path; see `find_stacks`.

    Returns:
        The numbered paths, and the axes that stack the layers.
    """
    parts = path.split(".")
    numbered, counts = list(parts), []
    for stack, count in stacks.items():
        prefix = f"{stack}.layer".lstrip(".").split(".")
        if parts[: len(prefix)] == prefix:
            numbered[len(prefix) - 1] = "{}"
            counts.append(count)
    name = ".".join(numbered)
    return tuple(name.format(*index) for index in np.ndindex(*counts)), tuple(counts)
