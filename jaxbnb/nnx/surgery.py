"""Walks through the modules of a model, and replaces them in place."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import flax.linen as nn
from flax import nnx

# The equivalent functions for a Linen model.
_LINEN: Final = {
    "quantize_model": "quantize_params(model, variables, x)",
    "dequantize_model": "dequantize_params(model, variables, x)",
    "outlier_columns": "outlier_columns(model, variables, x)",
}


def check_model(model: Any, function: str) -> None:
    """Raises TypeError unless ``model`` is an NNX model.

    For a Linen model, the message names the equivalent function.

    Args:
        model: argument of the caller.
        function: name of the function that was called.
    """
    if isinstance(model, nnx.Pytree):
        return
    got = type(model).__name__
    if isinstance(model, nn.Module):
        got = f"the Linen module {got}"
    twin = _LINEN.get(function)
    hint = f"; for a Linen model, use jaxbnb.linen.{twin}" if twin else ""
    raise TypeError(f"{function} takes an NNX model; got {got}{hint}")


def iter_children(
    model: nnx.Module,
) -> Iterator[tuple[str, nnx.Module, Any, nnx.Module]]:
    """Yields each module and variable below ``model``: path, parent, key, child.

    The path is dotted, and the key is the child's name in its parent. A module with two
    parents is yielded for each of them, but its children only once.
    """
    check_model(model, "jaxbnb.nnx or jaxbnb.lora")
    for path, parent in list(nnx.iter_modules(model)):
        for key, child in nnx.iter_children(parent):
            yield ".".join(map(str, (*path, key))), parent, key, child


def replace_child(parent: nnx.Module, key: Any, child: nnx.Module) -> None:
    """Replaces the module under ``key`` of ``parent`` by ``child``."""
    if isinstance(parent, nnx.List):
        parent[int(key)] = child
    elif isinstance(parent, nnx.Dict):
        parent[str(key)] = child
    else:
        setattr(parent, str(key), child)


def replace_modules(
    model: nnx.Module, new: Callable[[str, nnx.Module], nnx.Module | None]
) -> list[str]:
    """Replaces each module for which ``new(path, module)`` returns another one.

    Modules inside a replaced one are not visited. A module that occurs in several
    places is replaced by the same one in all of them.

    Returns:
        The dotted paths that were replaced, in the model's order.
    """
    replaced: list[str] = []
    others: dict[int, nnx.Module | None] = {}
    for path, parent, key, child in list(iter_children(model)):
        if any(path.startswith(done + ".") for done in replaced):
            continue
        if id(child) not in others:
            others[id(child)] = new(path, child)
        other = others[id(child)]
        if other is not None:
            replace_child(parent, key, other)
            replaced.append(path)
    return replaced


def collect_values(model: nnx.Pytree) -> dict[str, tuple[Any, Any]]:
    """Returns the variables of a model and the values that they store, by dotted path.

    An array that a module holds without a variable, as ``nnx.data``, counts as both.
    """
    return {
        ".".join(map(str, path)): (
            leaf,
            leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf,
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
