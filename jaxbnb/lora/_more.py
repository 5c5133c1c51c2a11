"""Finds what an adapter trains besides factors: modules, rows of tokens, biases."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from jaxbnb.core.paths import matches
from jaxbnb.lora._base import Embedding, get_bias, get_param, get_stack
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._switch import AdaptedModule
from jaxbnb.lora._targets import Linear, find_stacks, find_tied_head, number
from jaxbnb.lora._trained import TrainedModule
from jaxbnb.nnx import LayerStack, QuantLinear, QuantParam, surgery


class Saved(NamedTuple):
    """A module to train in full.

    Attributes:
        path: dotted path of the module.
        stack: axes that stack layers in front of its variables.
        module: the module, with or without trained copies.
        parent: module that holds it.
        key: its attribute or index there.
        is_head: whether it is an embedding that is trained as the output head, too.
    """

    path: str
    stack: tuple[int, ...]
    module: nnx.Module
    parent: nnx.Module
    key: Any
    is_head: bool = False


def needs_own_head(model: nnx.Module, config: LoraConfig) -> bool:
    """Whether a tied model needs a separate head, because ``config`` trains it."""
    ids = config.trainable_token_indices
    named = list(ids) if isinstance(ids, dict) else []
    for head in find_tied_head(model):
        # If the embedding's rows are trained as well, the head follows them.
        has_rows = len(named) == 1 and matches(head, named)
        is_saved = config.saves(head) and not config.ensure_weight_tying
        if config.targets(head) or is_saved or has_rows:
            return True
    return False


def find_embedding(model: nnx.Module) -> str:
    """Returns the path of a model's embedding of tokens.

    Raises:
        ValueError: there are several, and none is called ``embed_tokens``.
    """
    found = [
        path
        for path, parent, _, module in surgery.iter_children(model)
        if isinstance(_get_base(module), Embedding)
        and not isinstance(parent, AdaptedModule)
        and ".adapters." not in path
    ]
    named = [path for path in found if matches(path, ["embed_tokens"])]
    if len(named or found) != 1:
        raise ValueError(
            f"the embedding of tokens in {type(model).__name__} is not clear, it has "
            f"{found}; give trainable_token_indices as a dict by the module's name"
        )
    return (named or found)[0]


def _get_base(module: Any) -> Any:
    return module.base if isinstance(module, AdaptedModule) else module


def find_saved(model: nnx.Module, config: LoraConfig) -> list[Saved]:
    """Finds the modules that ``modules_to_save`` names.

    Raises:
        ValueError: a name means nothing, or what cannot be trained in full.
    """
    names = list(config.modules_to_save or ())
    tied = find_tied_head(model) if config.ensure_weight_tying and names else ()
    embedding = find_embedding(model) if tied else ""
    children = [
        (path, parent, key, module)
        for path, parent, key, module in surgery.iter_children(model)
        if isinstance(module, nnx.Module)
    ]
    saved: dict[str, Saved] = {}
    for name in names:
        if any(matches(head, [name]) for head in tied):
            name = embedding
        found = _find_named(model, name, children)
        if not found:
            raise ValueError(
                f"modules_to_save {name!r} names nothing in {type(model).__name__}, or "
                "only some of the layers of a stack; its modules are "
                f"{[path for path, *_ in children if '.adapters.' not in path]}"
            )
        for place in found:
            saved[place.path] = place._replace(is_head=place.path == embedding)
    # A module inside another is trained with it.
    return [
        place
        for path, place in saved.items()
        if not any(path.startswith(f"{other}.") for other in saved)
    ]


def _find_named(
    model: nnx.Module, name: str, children: Sequence[tuple[str, Any, Any, nnx.Module]]
) -> list[Saved]:
    inside = tuple(f"{p}." for p, *_, m in children if isinstance(m, AdaptedModule))
    stacks = find_stacks(model)
    found = []
    for path, parent, key, module in children:
        if path.startswith(inside):
            continue
        numbered, stack = number(path, stacks)
        if matches(path, [name]) or all(matches(n, [name]) for n in numbered):
            _check_saved(path, module)
            found.append(Saved(path, stack, module, parent, key))
    return found


def _check_saved(path: str, module: nnx.Module) -> None:
    below = [] if isinstance(module, TrainedModule) else list(nnx.iter_modules(module))
    if any(isinstance(each, AdaptedModule) for _, each in below):
        raise ValueError(
            f"modules_to_save names {path}, which has adapters; train it in full with "
            "the first adapter, or adapt it"
        )
    if any(isinstance(each, LayerStack) for _, each in below):
        raise ValueError(
            f"modules_to_save names {path}, which contains a stack of layers; name the "
            "modules in the layers"
        )
    variables = [v for _, v in nnx.to_flat_state(nnx.state(module))]
    if not any(isinstance(v, nnx.Param | QuantParam) for v in variables):
        raise ValueError(f"modules_to_save names {path}, which has no parameters")


def find_tokens(
    model: nnx.Module,
    config: LoraConfig,
    found: Sequence[Linear],
    adapted: Sequence[Linear],
) -> list[tuple[Linear, tuple[int, ...]]]:
    """Finds the layers that ``trainable_token_indices`` names, with their ids.

    Raises:
        ValueError: a name means nothing or several layers, an id is outside the
            vocabulary, or the layer is trained in another way already.
    """
    indices: Any = config.trainable_token_indices
    if not indices:
        return []
    if not isinstance(indices, dict):
        indices = {find_embedding(model): indices}
    indices = _without_tied_head(model, indices)
    tokens = []
    for name, ids in indices.items():
        layers = [linear for linear in found if matches(linear.path, [name])]
        if config.saves(name) or any(config.saves(each.path) for each in layers):
            raise ValueError(
                f"{name!r} is in modules_to_save, which trains all of its rows; leave "
                "it out there or in trainable_token_indices"
            )
        if len(layers) != 1:
            raise ValueError(
                f"trainable_token_indices {name!r} must name one embedding or linear "
                f"layer; in {type(model).__name__} it names "
                f"{[each.path for each in layers]}"
            )
        (linear,) = layers
        _check_tokens(linear, ids, adapted)
        tokens.append((linear, tuple(ids)))
    return tokens


def _without_tied_head(model: nnx.Module, indices: dict[str, Any]) -> dict[str, Any]:
    """Leaves out a head that follows the embedding's rows."""
    heads = [n for n in indices if any(matches(h, [n]) for h in find_tied_head(model))]
    others = {name: ids for name, ids in indices.items() if name not in heads}
    for head in heads:
        if not any(tuple(ids) == tuple(indices[head]) for ids in others.values()):
            raise ValueError(
                f"the embedding of {type(model).__name__} is its head too, so "
                f"trainable_token_indices must have the same ids for both; got "
                f"{indices}; or call model.untie_head() first"
            )
    return others


def _check_tokens(
    linear: Linear, ids: Sequence[int], adapted: Sequence[Linear]
) -> None:
    base = linear.base
    if not isinstance(base, Embedding | nnx.Linear | QuantLinear) or get_stack(base):
        raise ValueError(
            f"trainable_token_indices names {linear.path}, a {type(base).__name__}; it "
            "takes an embedding or a linear layer outside a stack"
        )
    if any(linear.path == each.path for each in adapted):
        raise ValueError(
            f"{linear.path} is in target_modules and in trainable_token_indices; leave "
            "it out in one of them"
        )
    axis = 0 if isinstance(base, Embedding) else 1
    size = get_param(base).shape[axis]
    if max(ids) >= size:
        raise ValueError(
            f"trainable_token_indices has the id {max(ids)}, and {linear.path} has "
            f"{size} rows; jaxbnb.models.resize_token_embeddings adds rows"
        )


def find_biased(
    model: nnx.Module,
    config: LoraConfig,
    found: Sequence[Linear],
    adapted: Sequence[Linear],
) -> tuple[list[Linear], list[Saved]]:
    """Finds the linear layers, and the other modules, with a bias to train."""
    if config.bias == "none":
        return [], []
    linears = [
        linear
        for linear in (adapted if config.bias == "lora_only" else found)
        if get_bias(linear.base) is not None
        and not config.saves(linear.path, *linear.names)
    ]
    if config.bias == "lora_only":
        return linears, []
    others = []
    stacks = find_stacks(model)
    inside = tuple(f"{linear.path}." for linear in found)
    for path, parent, key, module in surgery.iter_children(model):
        module = module.base if isinstance(module, TrainedModule) else module
        if not isinstance(getattr(module, "bias", None), nnx.Param):
            continue
        numbered, stack = number(path, stacks)
        is_linear = any(linear.path == path for linear in found)
        is_inside = path.startswith(inside) or ".adapters." in path
        is_base = isinstance(parent, AdaptedModule)
        if is_linear or is_inside or is_base or config.saves(path, *numbered):
            continue
        others.append(Saved(path, stack, getattr(parent, str(key)), parent, key))
    return linears, others
