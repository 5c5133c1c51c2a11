"""Loads a PyTorch model's weights into a user's Flax model, NNX or Linen."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from flax import nnx
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbnb.convert._state_dict_assignment import (
    Rule,
    Source,
    StateDictReport,
    Target,
    assign,
)
from jaxbnb.linen.boxes import put_in, take_out

# Variables that a call creates. No checkpoint has them, so they may get a tensor but do
# not need one. Random state never gets one.
_FROM_CALLS: Final = (nnx.Cache, nnx.Intermediate)
_FROM_CALLS_LINEN: Final = ("cache", "intermediates", "perturbations")


def load_state_dict(
    model: nnx.Module,
    source: Source,
    rules: Sequence[Rule],
    *,
    strict: bool = True,
) -> StateDictReport:
    r"""Loads the tensors of a PyTorch model into an NNX model, in place.

    Every tensor and every variable must be accounted for: each ``nnx.Param``, the
    running statistics of ``nnx.BatchNorm`` (``nnx.BatchStat``) and variables of any
    other type. Random state does not count. An ``nnx.Cache`` or ``nnx.Intermediate``
    may get a tensor but does not need one. The model changes only if all tensors fit;
    otherwise the error names all those that do not. Tensors are read one by one, and
    placed on the devices of their variables.

    Args:
        model: any NNX model. If a variable is quantised, its tensor is quantised to the
            same format.
        source: a ``state_dict`` (of torch, NumPy or JAX arrays), a `Checkpoint`, or
            a path for `open_checkpoint`.
        rules: ``(pattern, path)`` or ``(pattern, path, transform)``. The first rule
            with a ``pattern``, a regular expression, that matches a tensor's whole name
            applies. ``path`` is the dotted path of the variable, where ``\1`` stands
            for the text that the first group matched, or None to leave the tensor out.
            ``transform`` turns the tensor, a NumPy array, into the variable's array,
            e.g. ``np.transpose`` for the weight of a linear layer.
        strict: whether a variable without a tensor is an error. If False, it keeps its
            value, and ``untouched`` in the report names it. An abstract variable has no
            value to keep, so it is an error in any case, except for random state and
            variables that a call creates.

    Returns:
        Which tensor went to which variable.

    Raises:
        CheckpointError: a tensor matches no rule, goes to a variable that does not
            exist or that another tensor goes to, or differs from its variable in shape
            or kind of dtype (floating, integer).
        MissingTensorError: a variable gets no tensor.
        ValueError: a pattern is not a regular expression.
        TypeError: ``model`` is not an NNX model (use `load_variables` for Linen),
            ``source`` is a module instead of its ``state_dict``, or ``rules`` is not a
            list, but e.g. a dict.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from jaxbnb.convert import load_state_dict
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
            "load_state_dict loads tensors into an NNX model; got "
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
        targets[".".join(map(str, path))] = Target(
            value,
            # The shape of the kernel, even if it is stored as matrices.
            tuple(leaf.shape),
            not isinstance(leaf, _FROM_CALLS),
            leaf.get_metadata().get("axes") if is_variable else None,
        )
    values, report = assign(targets, source, rules, strict, type(model).__name__)
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
    source: Source,
    rules: Sequence[Rule],
    *,
    strict: bool = True,
) -> tuple[dict[str, Any], StateDictReport]:
    r"""Loads the tensors of a PyTorch model into the variables of a Linen model.

    Works like `load_state_dict`. A path begins with the collection, e.g.
    ``"params.Dense_0.kernel"`` or ``"batch_stats.BatchNorm_0.mean"``. Every variable
    must get a tensor, except for those in ``cache``, ``intermediates`` and
    ``perturbations``. Boxes, e.g. ``nn.Partitioned``, stay around their values.

    Args:
        variables: result of ``model.init``, or its shapes from
            ``jax.eval_shape(model.init, ...)``. If a weight is quantised, its tensor is
            quantised to the same format, in the shape of the stored matrices.
        source: see `load_state_dict`.
        rules: see `load_state_dict`.
        strict: see `load_state_dict`.

    Returns:
        ``(variables, report)``: the new variables, and which tensor went to which.

    Raises:
        CheckpointError: see `load_state_dict`.
        MissingTensorError: a variable gets no tensor.
        ValueError: a pattern is not a regular expression.
        TypeError: ``variables`` is not a dict of collections; see also
            `load_state_dict`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
        >>> from jaxbnb.convert import load_variables
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
            "load_variables takes the result of model.init, a dict of collections; got "
            f"{type(variables).__name__}.{hint}"
        )
    tree = unfreeze(FrozenDict(variables))
    leaves = flatten_dict(tree, keep_empty_nodes=True)
    targets = {}
    for path, leaf in leaves.items():
        value = take_out(leaf)
        if hasattr(value, "dtype"):
            targets[".".join(path)] = Target(
                value, tuple(value.shape), path[0] not in _FROM_CALLS_LINEN
            )
    values, report = assign(targets, source, rules, strict, "the variables")
    new = {
        path: put_in(leaf, values[name]) if (name := ".".join(path)) in values else leaf
        for path, leaf in leaves.items()
    }
    return unflatten_dict(new), report
