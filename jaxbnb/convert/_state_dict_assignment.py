"""Decides which tensor goes to which variable, and converts the tensors."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError, MissingTensorError
from jaxbnb.convert._open import open_checkpoint
from jaxbnb.core import QuantizedArray, quantize
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.rules import check_rules

Source = Checkpoint | Mapping[str, Any] | str | os.PathLike[str]
Transform = Callable[[np.ndarray], np.ndarray]
Rule = tuple[str, str | None] | tuple[str, str | None, Transform]


@dataclasses.dataclass(frozen=True)
class StateDictReport:
    """What happened to each tensor and each variable.

    Attributes:
        mapped: tensor -> the variable that got it.
        reshaped: tensor -> its shape and the variable's, where these differ.
        ignored: tensors that a rule leaves out.
        untouched: variables that got no tensor and are unchanged.
    """

    mapped: dict[str, str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ignored: list[str]
    untouched: list[str]


@dataclasses.dataclass(frozen=True)
class Target:
    """A variable that may get a tensor.

    Attributes:
        value: present value, which may be abstract.
        shape: shape that its tensor must have.
        is_needed: whether it must get a tensor.
        axes: axes of a quantised kernel that is stored as matrices.
    """

    value: Any
    shape: tuple[int, ...]
    is_needed: bool
    axes: Any = None


@dataclasses.dataclass(frozen=True)
class _CompiledRule:
    """A rule with its pattern compiled, and the identity as default transform."""

    pattern: re.Pattern[str]
    path: str | None
    transform: Transform


def assign(
    targets: Mapping[str, Target],
    source: Source,
    rules: Sequence[Rule],
    strict: bool,
    model: str,
) -> tuple[dict[str, Any], StateDictReport]:
    """Assigns tensors to variables; see `load_state_dict`.

    Args:
        targets: variables by path.
        source: the tensors.
        rules: where each tensor goes.
        strict: whether every needed variable must get a tensor.
        model: name of the model in errors.

    Returns:
        The new value of each variable that gets a tensor, and the report.
    """
    check_rules(rules, "(pattern, path) pairs or (pattern, path, transform)", (2, 3))
    infos, read = _open(source)
    compiled = [_compile(rule) for rule in rules]
    moves: dict[str, tuple[str, Transform]] = {}
    taken: dict[str, str] = {}
    reshaped, ignored, problems = {}, [], []
    for name, (shape, dtype) in infos.items():
        found = ((rule, rule.pattern.fullmatch(name)) for rule in compiled)
        rule, match = next((pair for pair in found if pair[1]), (None, None))
        if rule is None or match is None:
            problems.append(f"no rule: {name}, of shape {shape}")
            continue
        if rule.path is None:
            ignored.append(name)
            continue
        path = match.expand(rule.path)
        problem = _find_mismatch(name, dtype, path, targets, taken)
        if problem is not None:
            problems.append(problem)
            continue
        expected = targets[path].shape
        result = _find_shape(rule.transform, shape, dtype)
        if result != expected:
            problems.append(f"shape: {name} becomes {result}; {path} has {expected}")
        elif shape != expected:
            reshaped[name] = (shape, expected)
        moves[name], taken[path] = (path, rule.transform), name
    untouched = [
        path
        for path, target in targets.items()
        if target.is_needed and path not in taken
    ]
    missing = []
    for path in untouched:
        is_abstract = _is_abstract(targets[path].value)
        if strict or is_abstract:
            hint = ", which is a shape without a value" * is_abstract
            missing.append(f"missing: nothing goes to {path}{hint}")
    if missing or problems:
        error = MissingTensorError if missing else CheckpointError
        raise error(
            f"the tensors do not fit {model}:\n  " + "\n  ".join(problems + missing)
        )
    values = {
        path: _convert(transform(read(name)), targets[path], name)
        for name, (path, transform) in moves.items()
    }
    mapped = {name: path for name, (path, _) in moves.items()}
    return values, StateDictReport(mapped, reshaped, ignored, untouched)


def _find_mismatch(
    name: str,
    dtype: np.dtype,
    path: str,
    targets: Mapping[str, Target],
    taken: Mapping[str, str],
) -> str | None:
    """Returns why a tensor cannot go to a variable, whatever its shape, or None."""
    if path not in targets:
        return f"no variable: {name} goes to {path}"
    if path in taken:
        return f"twice: {name} and {taken[path]} both go to {path}"
    kind = _find_kind(targets[path].value.dtype)
    if kind != _find_kind(dtype):
        return f"dtype: {name} is {dtype}, which is not {kind}"
    if kind == "floating" and dtype.itemsize == 1:
        return (
            f"dtype: {name} is {dtype}, the codes of a quantised weight; multiply "
            "them by their scales first, in bfloat16 or float32"
        )
    return None


def _find_shape(
    transform: Transform, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[int, ...] | str:
    """Returns the shape after a transform, or its error.

    Tries the transform on zeros that take no memory.
    """
    try:
        return np.shape(transform(np.broadcast_to(np.zeros((), dtype), shape)))
    # The transform is the user's and may raise anything.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _is_abstract(value: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(value))


def _find_kind(dtype: Any) -> str:
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "bool": jnp.bool_}
    names = (name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind))
    return next(names, "complex")


def _convert(array: np.ndarray, target: Target, name: str) -> Any:
    """Converts a tensor to the dtype, format and placement of its variable."""
    value = target.value
    if _find_kind(value.dtype) == "integer":
        limits = jnp.iinfo(value.dtype)
        if np.any((array < limits.min) | (array > limits.max)):
            raise CheckpointError(f"{name} has values that {value.dtype} cannot hold")
    new: Any = jnp.asarray(array, value.dtype)
    if isinstance(value, QuantizedArray):
        new = new if target.axes is None else target.axes.to_matrices(new)
        new = quantize(
            new,
            value.quant_type,
            block_size=None if value.quant_type == LLM_INT8 else value.block_size,
            axis=value.axis,
            double_quant=value.double_quant,
        )
    return jax.tree.map(_place, new, value)


def _place(new: jax.Array, old: Any) -> jax.Array:
    is_placed = isinstance(old, jax.ShapeDtypeStruct) or getattr(
        old, "committed", False
    )
    sharding = getattr(old, "sharding", None) if is_placed else None
    return new if sharding is None else jax.device_put(new, sharding)


def _open(
    source: Source,
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Callable[[str], np.ndarray]]:
    """Returns the shape and dtype of each tensor, and a function that reads one."""
    if isinstance(source, Mapping):
        arrays = {name: _to_numpy(tensor) for name, tensor in source.items()}
        infos = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        return infos, arrays.__getitem__
    if not isinstance(source, Checkpoint | str | os.PathLike):
        hint = ". Give module.state_dict()" * hasattr(source, "state_dict")
        raise TypeError(
            "the tensors come from a state_dict, a Checkpoint, or the path of one; got "
            f"{type(source).__name__}{hint}"
        )
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    infos = {
        name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()
    }
    return infos, checkpoint.read


def _to_numpy(tensor: Any) -> np.ndarray:
    if type(tensor).__module__.partition(".")[0] != "torch":
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        import torch

        # NumPy lacks both dtypes, so their bits are reinterpreted.
        integer = torch.int16 if name == "bfloat16" else torch.uint8
        return tensor.contiguous().view(integer).numpy().view(jnp.dtype(name))
    return tensor.numpy()


def _compile(rule: Rule) -> _CompiledRule:
    pattern, path = rule[0], rule[1]
    transform = rule[2] if len(rule) == 3 else _keep
    try:
        return _CompiledRule(re.compile(pattern), path, transform)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _keep(array: np.ndarray) -> np.ndarray:
    return array
