"""Loads a PyTorch model's weights into a user's own Flax model, NNX or Linen."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError, MissingTensorError
from jaxbnb.convert._open import open_checkpoint
from jaxbnb.core import QuantizedArray, quantize
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.rules import check_rules
from jaxbnb.linen.boxes import put_in, take_out

Transform = Callable[[np.ndarray], np.ndarray]
Mapped = tuple[str, str | None] | tuple[str, str | None, Transform]


# Variables that a call leaves behind. No checkpoint has them, so one may be a target
# but does not need a tensor. Random state is never a target.
_FROM_CALLS: Final = (nnx.Cache, nnx.Intermediate)
_FROM_CALLS_LINEN: Final = ("cache", "intermediates", "perturbations")


@dataclasses.dataclass(frozen=True)
class StateDictReport:
    """What became of each tensor, and of each variable.

    Attributes:
        mapped: tensor -> the variable that it is in.
        reshaped: tensors -> their shape and the variable's, where these differ.
        ignored: tensors that a rule says to leave out.
        untouched: variables that no tensor went to, unchanged.
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

    Every tensor and every variable must be accounted for: each ``nnx.Param``, the
    running statistics of ``nnx.BatchNorm`` (``nnx.BatchStat``) and variables of any
    other type. Random state is not a weight. An ``nnx.Cache`` or ``nnx.Intermediate``
    may be given a tensor but does not need one. Nothing is changed unless all tensors
    fit, and the error names all that do not. Tensors are read one by one, and go where
    the variable is.

    Args:
        model: any NNX model. For a variable that is quantised already, the tensor is
            quantised in the same format.
        source: a ``state_dict`` (of torch, NumPy or JAX arrays), a `Checkpoint`, or
            what `open_checkpoint` opens.
        rules: ``(pattern, path)`` or ``(pattern, path, transform)``. The first pattern,
            a regular expression that matches a tensor's whole name, decides: ``path``
            is the dotted path of the variable, where ``\1`` is what the first group
            has matched, or None to leave the tensor out; ``transform`` makes NumPy's
            array of the tensor the variable's, e.g. ``np.transpose`` for the weight of
            a linear layer.
        strict: whether a variable that gets no tensor is an error. With False it keeps
            its value, and the report's ``untouched`` names it. An abstract variable has
            no value to keep, so for it this is an error all the same; only random state
            and what a call leaves behind may stay abstract.

    Returns:
        What went where.

    Raises:
        CheckpointError: tensors that no rule names, that go to no variable or to one
            that another goes to, or that have another shape or another kind of dtype
            (floating, integer) than it.
        MissingTensorError: there are variables that no tensor goes to.
        ValueError: a pattern is no regular expression.
        TypeError: ``model`` is not an NNX model (use `load_variables` for Linen),
            ``source`` is a module rather than its ``state_dict``, or ``rules`` are not
            in a list, e.g. in a dict.

    Example:
        >>> model = nnx.Dict(up=nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
        ...                  norm=nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> state_dict = {"net.0.weight": np.ones((8, 4)), "net.0.bias": np.ones(8),
        ...               "net.1.weight": np.ones(8), "net.1.bias": np.ones(8),
        ...               "net.1.running_mean": np.ones(8),
        ...               "net.1.running_var": np.full(8, 2.0),
        ...               "net.1.num_batches_tracked": np.array(7)}
        >>> report = load_state_dict(model, state_dict, [
        ...     (r"net\.0\.weight", "up.kernel", np.transpose),
        ...     (r"net\.0\.bias", "up.bias"),
        ...     (r"net\.1\.weight", "norm.scale"),
        ...     (r"net\.1\.bias", "norm.bias"),
        ...     (r"net\.1\.running_(mean|var)", r"norm.\1"),
        ...     (r".*\.num_batches_tracked", None)])
        >>> report.mapped["net.0.weight"], report.reshaped["net.0.weight"]
        ('up.kernel', ((8, 4), (4, 8)))
        >>> report.ignored, float(model["norm"].var[...].sum())
        (['net.1.num_batches_tracked'], 16.0)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "load_state_dict puts tensors into an NNX model; got "
            f"{type(model).__name__}. Use load_variables for the variables of a Linen "
            "model"
        )
    state = nnx.state(model)
    leaves = nnx.to_flat_state(state)
    targets = {}
    for path, leaf in leaves:
        is_variable = isinstance(leaf, nnx.Variable)
        value = leaf.get_raw_value() if is_variable else leaf
        if isinstance(leaf, nnx.RngState) or not hasattr(value, "dtype"):
            continue
        targets[".".join(map(str, path))] = _Target(
            value,
            # The kernel's own shape, even where it is held as matrices.
            tuple(leaf.shape),
            not isinstance(leaf, _FROM_CALLS),
            leaf.get_metadata().get("axes") if is_variable else None,
        )
    values, report = _assign(targets, source, rules, strict, type(model).__name__)
    new = []
    for path, leaf in leaves:
        value = values.get(".".join(map(str, path)))
        if value is None:
            continue
        new.append((path, leaf.replace(value) if hasattr(leaf, "replace") else value))
    nnx.update(model, nnx.from_flat_state(new))
    return report


def load_variables(
    variables: Mapping[str, Any],
    source: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
    rules: Sequence[Mapped],
    *,
    strict: bool = True,
) -> tuple[dict[str, Any], StateDictReport]:
    r"""Puts the tensors of a PyTorch model into the variables of a Linen model.

    Works as `load_state_dict` does. A path begins with the collection:
    ``"params.Dense_0.kernel"``, ``"batch_stats.BatchNorm_0.mean"``. Every variable must
    get a tensor, except for those in ``cache``, ``intermediates`` and
    ``perturbations``. Boxes, e.g. ``nn.Partitioned``, stay around their values.

    Args:
        variables: result of ``model.init``, or its shapes from
            ``jax.eval_shape(model.init, ...)``. For a weight that is quantised already,
            the tensor is quantised in the same format, as the matrices that it is held
            as.
        source: see `load_state_dict`.
        rules: see `load_state_dict`.
        strict: see `load_state_dict`.

    Returns:
        ``(variables, report)``: new variables, and which tensor went where.

    Raises:
        CheckpointError: see `load_state_dict`.
        MissingTensorError: there are variables that no tensor goes to.
        ValueError: a pattern is no regular expression.
        TypeError: ``variables`` is not a dict of collections, or see
            `load_state_dict`.

    Example:
        >>> import flax.linen as nn
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train=False):
        ...         x = nn.Dense(8)(x)
        ...         return nn.BatchNorm(use_running_average=not train)(x)
        >>> model, x = Model(), jnp.ones((1, 4))
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> state_dict = {"0.weight": np.ones((8, 4)), "0.bias": np.zeros(8),
        ...               "1.weight": np.ones(8), "1.bias": np.ones(8),
        ...               "1.running_mean": np.full(8, 4.0),
        ...               "1.running_var": np.ones(8)}
        >>> variables, report = load_variables(shapes, state_dict, [
        ...     (r"0\.weight", "params.Dense_0.kernel", np.transpose),
        ...     (r"0\.bias", "params.Dense_0.bias"),
        ...     (r"1\.weight", "params.BatchNorm_0.scale"),
        ...     (r"1\.bias", "params.BatchNorm_0.bias"),
        ...     (r"1\.running_(mean|var)", r"batch_stats.BatchNorm_0.\1")])
        >>> model.apply(variables, x)[0, :2]
        Array([1., 1.], dtype=float32)
    """
    if not isinstance(variables, Mapping):
        hint = " Use load_state_dict for NNX." * isinstance(variables, nnx.Module)
        raise TypeError(
            "load_variables takes the variables that model.init gave, a dict of "
            f"collections; got {type(variables).__name__}.{hint}"
        )
    tree = unfreeze(FrozenDict(variables))
    leaves = flatten_dict(tree, keep_empty_nodes=True)
    targets = {}
    for path, leaf in leaves.items():
        value = take_out(leaf)
        if hasattr(value, "dtype"):
            targets[".".join(path)] = _Target(
                value, tuple(value.shape), path[0] not in _FROM_CALLS_LINEN
            )
    values, report = _assign(targets, source, rules, strict, "the variables")
    new = {
        path: put_in(leaf, values[name]) if (name := ".".join(path)) in values else leaf
        for path, leaf in leaves.items()
    }
    return unflatten_dict(new), report


@dataclasses.dataclass(frozen=True)
class _Target:
    """A variable that may get a tensor.

    Attributes:
        value: its present value, perhaps abstract.
        shape: shape that its tensor must have.
        is_needed: whether it must get one.
        axes: axes of a quantised kernel that is held as matrices.
    """

    value: Any
    shape: tuple[int, ...]
    is_needed: bool
    axes: Any = None


def _assign(
    targets: Mapping[str, _Target],
    source: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
    rules: Sequence[Mapped],
    strict: bool,
    model: str,
) -> tuple[dict[str, Any], StateDictReport]:
    """Returns the new value of each variable that gets a tensor, and the report."""
    check_rules(rules, "(pattern, path) pairs or (pattern, path, transform)", (2, 3))
    infos, read = _open(source)
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
        elif path not in targets:
            problems.append(f"no variable: {name} goes to {path}")
        elif path in taken:
            problems.append(f"twice: {name} and {taken[path]} both go to {path}")
        elif (kind := _kind(targets[path].value.dtype)) != _kind(dtype):
            problems.append(f"dtype: {name} is {dtype}, which is not {kind}")
        elif kind == "floating" and dtype.itemsize == 1:
            problems.append(
                f"dtype: {name} is {dtype}, the codes of a quantised weight; multiply "
                "them by their scales first, in bfloat16 or float32"
            )
        else:
            want = targets[path].shape
            got = _shape_after(transform, shape, dtype)
            if got != want:
                problems.append(f"shape: {name} becomes {got}; {path} has {want}")
            elif shape != want:
                reshaped[name] = (shape, want)
            moves[name], taken[path] = (path, transform), name
    untouched = [
        path
        for path, target in targets.items()
        if target.is_needed and path not in taken
    ]
    missing = [
        f"missing: nothing goes to {path}" + ", which is a shape without a value" * bare
        for path in untouched
        if (bare := _is_abstract(targets[path].value)) or strict
    ]
    if missing or problems:
        kind = MissingTensorError if missing else CheckpointError
        raise kind(
            f"the tensors do not fit {model}:\n  " + "\n  ".join(problems + missing)
        )
    values = {
        path: _stored(transform(read(name)), targets[path], name)
        for name, (path, transform) in moves.items()
    }
    mapped = {name: path for name, (path, _) in moves.items()}
    return values, StateDictReport(mapped, reshaped, ignored, untouched)


def _is_abstract(value: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(value))


def _kind(dtype: Any) -> str:
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "bool": jnp.bool_}
    found = (name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind))
    return next(found, "complex")


def _stored(array: np.ndarray, target: _Target, name: str) -> Any:
    """A tensor with the dtype, format and placement of its variable."""
    value = target.value
    if _kind(value.dtype) == "integer":
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


Info = tuple[tuple[int, ...], np.dtype]


def _open(
    source: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[dict[str, Info], Callable[[str], np.ndarray]]:
    """Shape and dtype of each tensor, and what reads one."""
    if isinstance(source, Mapping):
        arrays = {name: _as_numpy(tensor) for name, tensor in source.items()}
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


def _as_numpy(tensor: Any) -> np.ndarray:
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
