"""load_state_dict: a PyTorch model's weights into a user's own Flax model."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError, MissingTensorError
from jaxbnb.convert._open import open_checkpoint

Transform = Callable[[np.ndarray], np.ndarray]
Mapped = tuple[str, str | None] | tuple[str, str | None, Transform]


@dataclasses.dataclass(frozen=True)
class StateDictReport:
    """What became of each tensor, and of each variable.

    Attributes:
        mapped: tensor -> the variable that it is in.
        reshaped: tensors -> their shape and the variable's, where these differ.
        ignored: tensors that a rule says to leave out.
        untouched: variables that no tensor went to.
    """

    mapped: dict[str, str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ignored: list[str]
    untouched: list[str]


def load_state_dict(
    model: nnx.Module,
    source: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
    rules: Sequence[Mapped],
    *,
    strict: bool = True,
) -> StateDictReport:
    r"""Puts the tensors of a PyTorch model into an NNX model, in place.

    Every tensor and every ``nnx.Param`` must be accounted for. Nothing is changed
    unless all of them fit; the error names all that do not. Tensors are read one by
    one.

    Args:
        model: any NNX model that is not quantised; quantise it afterwards.
        source: a ``state_dict`` (of torch, NumPy or JAX arrays), a `Checkpoint`, or
            what `open_checkpoint` opens.
        rules: ``(pattern, path)`` or ``(pattern, path, transform)``. The first pattern,
            a regular expression that matches a tensor's whole name, decides: ``path``
            is the dotted path of the variable, where ``\1`` is what the first group
            has matched, or None to leave the tensor out; ``transform`` makes NumPy's
            array of the tensor the variable's, e.g. ``np.transpose`` for the weight of
            a linear layer.
        strict: whether a variable that no tensor goes to is an error.

    Returns:
        What went where.

    Raises:
        CheckpointError: tensors that no rule names, that go to no variable or to one
            that another goes to, or have another shape than it or no floating dtype.
        MissingTensorError: there are variables that no tensor goes to.
        ValueError: a pattern is no regular expression.

    Example:
        >>> model = nnx.Dict(up=nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> state_dict = {"net.0.weight": np.ones((8, 4)), "net.0.bias": np.ones(8),
        ...               "net.0.steps": np.array(7)}
        >>> report = load_state_dict(model, state_dict, [
        ...     (r"net\.0\.weight", "up.kernel", np.transpose),
        ...     (r"net\.0\.bias", "up.bias"),
        ...     (r".*\.steps", None)])
        >>> report.mapped["net.0.weight"], report.reshaped["net.0.weight"]
        ('up.kernel', ((8, 4), (4, 8)))
        >>> report.ignored, float(model["up"].kernel.sum())
        (['net.0.steps'], 32.0)
    """
    infos, read = _open(source)
    state = nnx.state(model, nnx.Param)
    variables: dict[str, Any] = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(state)
    }
    compiled = [_compile(rule) for rule in rules]
    moves: dict[str, tuple[str, Transform]] = {}
    taken: dict[str, str] = {}
    reshaped, ignored, problems = {}, [], []
    for name, (shape, dtype) in infos.items():
        path, transform = _target(name, compiled)
        if path is None and transform is not None:
            ignored.append(name)
        elif path is None or transform is None:
            problems.append(f"no rule: {name}, of shape {shape}")
        elif path not in variables:
            problems.append(f"no variable: {name} goes to {path}")
        elif path in taken:
            problems.append(f"twice: {name} and {taken[path]} both go to {path}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            problems.append(f"dtype: {name} is {dtype}, which is not floating")
        elif dtype.itemsize == 1:
            problems.append(
                f"dtype: {name} is {dtype}, the codes of a quantised weight; multiply "
                "them by their scales first, in bfloat16 or float32"
            )
        else:
            want = tuple(variables[path].shape)
            got = _shape_after(transform, shape, dtype)
            if got != want:
                problems.append(f"shape: {name} becomes {got}; {path} has {want}")
            elif shape != want:
                reshaped[name] = (shape, want)
            moves[name], taken[path] = (path, transform), name
    untouched = [path for path in variables if path not in taken]
    missing = [f"missing: nothing goes to {path}" for path in untouched if strict]
    if missing or problems:
        kind = MissingTensorError if missing else CheckpointError
        raise kind(
            f"the tensors do not fit {type(model).__name__}:\n  "
            + "\n  ".join(problems + missing)
        )
    for name, (path, transform) in moves.items():
        variable = variables[path]
        variable.set_value(jnp.asarray(transform(read(name)), variable.dtype))
    nnx.update(model, state)
    mapped = {name: path for name, (path, _) in moves.items()}
    return StateDictReport(mapped, reshaped, ignored, untouched)


Info = tuple[tuple[int, ...], np.dtype]


def _open(
    source: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[dict[str, Info], Callable[[str], np.ndarray]]:
    """Shape and dtype of each tensor, and what reads one."""
    if isinstance(source, Mapping):
        arrays = {name: _as_numpy(tensor) for name, tensor in source.items()}
        infos = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        return infos, arrays.__getitem__
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    infos = {
        name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()
    }
    return infos, checkpoint.read


def _as_numpy(tensor: Any) -> np.ndarray:
    if type(tensor).__module__.partition(".")[0] != "torch":
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        import torch

        # NumPy has neither of torch's, but it has their bits.
        integer = torch.int16 if name == "bfloat16" else torch.uint8
        return tensor.contiguous().view(integer).numpy().view(jnp.dtype(name))
    return tensor.numpy()


def _compile(rule: Mapped) -> tuple[re.Pattern[str], str | None, Transform]:
    pattern, path = rule[0], rule[1]
    transform = rule[2] if len(rule) == 3 else _as_it_is
    try:
        return re.compile(pattern), path, transform
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def _target(
    name: str, rules: Sequence[tuple[re.Pattern[str], str | None, Transform]]
) -> tuple[str | None, Transform | None]:
    """The path and the transform of the first rule for a tensor; None without one."""
    for pattern, path, transform in rules:
        if match := pattern.fullmatch(name):
            return None if path is None else match.expand(path), transform
    return None, None


def _shape_after(
    transform: Transform, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[int, ...] | str:
    """The shape that a transform gives, tried on zeros that take no memory."""
    try:
        return np.shape(transform(np.broadcast_to(np.zeros((), dtype), shape)))
    # It is the user's, and may raise anything.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
