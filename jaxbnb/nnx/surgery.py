"""Replacing modules of a model in place."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import flax.linen as nn
from flax import nnx

# The functions that do the same for a Linen model.
_LINEN: Final = {
    "quantize_model": "quantize_params(model, variables, x)",
    "dequantize_model": "dequantize_params(model, variables, x)",
    "outlier_columns": "outlier_columns(model, variables, x)",
}


def check_model(model: Any, function: str) -> None:
    """Raises TypeError unless ``model`` is an NNX model; names a function for Linen's.

    Args:
        model: what the caller gave.
        function: name of the function that it was given to.
    """
    if isinstance(model, nnx.Pytree):
        return
    got = type(model).__name__
    if isinstance(model, nn.Module):
        got = f"the Linen module {got}"
    twin = _LINEN.get(function)
    hint = f"; for a Linen model, use jaxbnb.linen.{twin}" if twin else ""
    raise TypeError(f"{function} takes an NNX model; got {got}{hint}")


def children(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, Any, nnx.Module]]:
    """Every module below ``model``: its dotted path, its parent, its key there, itself.

    And every variable. A module that two others hold is given for each, what is inside
    it once.
    """
    check_model(model, "jaxbnb.nnx or jaxbnb.lora")
    for path, parent in list(nnx.iter_modules(model)):
        for key, child in nnx.iter_children(parent):
            yield ".".join(map(str, (*path, key))), parent, key, child


def replace(parent: nnx.Module, key: Any, child: nnx.Module) -> None:
    """Puts ``child`` where ``parent`` holds another one under ``key``."""
    if isinstance(parent, nnx.List):
        parent[int(key)] = child
    elif isinstance(parent, nnx.Dict):
        parent[str(key)] = child
    else:
        setattr(parent, str(key), child)


def replace_modules(
    model: nnx.Module, new: Callable[[str, nnx.Module], nnx.Module | None]
) -> list[str]:
    """Replaces each module for which ``new(path, module)`` gives another one.

    Modules inside a replaced one are not visited. One held in several places stays one.

    Returns:
        The dotted paths that were replaced, in the model's order.
    """
    replaced: list[str] = []
    others: dict[int, nnx.Module | None] = {}
    for path, parent, key, child in list(children(model)):
        if any(path.startswith(done + ".") for done in replaced):
            continue
        if id(child) not in others:
            others[id(child)] = new(path, child)
        other = others[id(child)]
        if other is not None:
            replace(parent, key, other)
            replaced.append(path)
    return replaced


def values(model: nnx.Pytree) -> dict[str, tuple[Any, Any]]:
    """What a model holds by dotted path: the variable, and the value that it stores.

    Both are the array where a module holds one without a variable, as ``nnx.data``.
    """
    return {
        ".".join(map(str, path)): (
            leaf,
            leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf,
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
