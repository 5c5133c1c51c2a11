"""Linear layers of an NNX model: where they are, and their matrices and rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.core import contraction
from jaxbnb.core.contraction import KernelAxes
from jaxbnb.nnx import LayerStack, surgery


def linear_paths(
    model: nnx.Module, kinds: Sequence[type] = (nnx.Linear, nnx.LinearGeneral)
) -> list[str]:
    """Returns the paths of linear layers with one kernel, or one a layer of a stack."""
    stacks, paths, seen = find_stacks(model), [], []
    for path, _, _, module in surgery.iter_children(model):
        is_new = not any(module is other for other in seen)
        if type(module) not in kinds or not is_new:
            continue
        linear: Any = module
        axes = kernel_axes(linear)
        in_stack = any(path.startswith(f"{stack}.") for stack in stacks)
        if not axes.batch and len(linear.kernel.shape) == len(axes.shape) + in_stack:
            paths.append(path)
            seen.append(module)
    return paths


def kernel_axes(linear: Any) -> KernelAxes:
    """Returns the roles of the axes of a layer's kernel, as it is in one layer."""
    if not isinstance(linear, nnx.LinearGeneral):
        return contraction.kernel_axes(0, 1, tuple(linear.kernel.shape[-2:]))
    batch = tuple(linear.batch_axis.values())
    shape = (*batch, *linear.in_features, *linear.out_features)
    return contraction.kernel_axes(len(batch), len(linear.in_features), shape)


def rows_of(linear: Any, x: Float[Array, "..."]) -> Float[Array, "*rest fan_in"]:
    """Returns the rows of an input that a layer multiplies by its matrix."""
    if not isinstance(linear, nnx.LinearGeneral):
        return x
    # Flax sorts them.
    summed = sorted(axis % x.ndim for axis in linear.axis)
    x = jnp.moveaxis(x, summed, range(x.ndim - len(summed), x.ndim))
    return x.reshape(*x.shape[: x.ndim - len(summed)], -1)


def find_stacks(model: nnx.Module) -> list[str]:
    """Returns the paths of the stacks that are in no other stack."""
    paths = [
        path
        for path, _, _, module in surgery.iter_children(model)
        if isinstance(module, LayerStack)
    ]
    return [
        path
        for path in paths
        if not any(path.startswith(f"{other}.") for other in paths)
    ]


def copy_modules(model: nnx.Module) -> nnx.Module:
    """Returns other modules with the same arrays."""
    return nnx.merge(*nnx.split(model))


def child(model: nnx.Module, path: str) -> Any:
    """Returns the module at a path."""
    for place, _, _, module in surgery.iter_children(model):
        if place == path:
            return module
    raise KeyError(path)


def replace(
    model: nnx.Module, paths: Sequence[str], new: Callable[[str, Any], Any]
) -> None:
    """Puts ``new(path, module)`` in the place of the modules at these paths."""
    chosen = {*paths}

    def choose(path: str, module: Any) -> Any:
        return new(path, module) if path in chosen else None

    surgery.replace_modules(model, choose)
