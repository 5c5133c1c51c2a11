"""Settings by parameter path, and a table of the state that each parameter has."""

import inspect
import re
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.core
import jax
import optax
from flax import nnx

from jaxbnb.core import tree_nbytes
from jaxbnb.core._paths import matches

Pattern = str | Sequence[str]
Overrides = Mapping[str, Any]

# What wraps one array, its own last key no part of a parameter's name.
_BOXES = (nnx.Variable, flax.core.meta.AxisMetadata)


def per_parameter(
    make: Callable[..., optax.GradientTransformation],
    rules: Mapping[Any, Overrides] | Sequence[tuple[Pattern, Overrides]],
    **defaults: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with other settings for some parameters, chosen by path.

    The first rule that matches a parameter's dotted path decides; without one it has
    the defaults. The settings need not be about precision: a rule may change
    ``learning_rate`` or ``weight_decay`` too.

    It is an `optax.partition` with one ``make(**settings)`` for each distinct settings,
    labelled "default" or "rule_i" by the first rule that has them. A clip by global
    norm inside ``make`` is thus of the parameters with these settings only.

    Args:
        make: an optimizer factory, such as `jaxbnb.adamw8bit` or `optax.adamw`.
        rules: ``(pattern, overrides)`` pairs, or a dict, in order. A pattern is a list
            or tuple of names, each the whole path or its last parts, or one string: a
            regular expression that matches the whole path. The overrides are keyword
            arguments of ``make``, and go before the defaults.
        **defaults: keyword arguments of ``make`` for all parameters.

    Returns:
        An ``optax.GradientTransformationExtraArgs``. Its ``init`` and ``update`` raise
        ValueError where a rule decides for no parameter.

    Raises:
        TypeError: ``make`` does not take an override or default.
        ValueError: a rule is not a pair of a pattern and a dict.

    Example:
        The embedding keeps moments in float32, and nothing but kernels decays:

        >>> import jax.numpy as jnp, jaxbnb
        >>> params = {"embed": {"embedding": jnp.ones((512, 64))},
        ...           "dense": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}}
        >>> tx = jaxbnb.optim.per_parameter(
        ...     jaxbnb.adamw8bit,
        ...     [(["embedding"], {"min_quantized_size": 2**60, "weight_decay": 0.0}),
        ...      (r".*(bias|scale)", {"weight_decay": 0.0})],
        ...     learning_rate=1e-3, weight_decay=0.1)
        >>> sorted(tx.init(params).inner_states)
        ['default', 'rule_0', 'rule_1']
        >>> print(jaxbnb.optim.state_table(tx, params))
        parameter        shape      dtype    state            bytes  per element
        dense.bias       (256,)     float32  float32           2048         8.00
        dense.kernel     (64, 256)  float32  uint8, float32   33280         2.03
        embed.embedding  (512, 64)  float32  float32         262144         8.00
        other                                int32               12
        total                                                297484         6.02

    References:
        ``GlobalOptimManager`` of bitsandbytes.
    """
    pairs = _check_rules(rules)
    _check_arguments(make, defaults, "the defaults")
    groups: dict[str, dict[str, Any]] = {"default": defaults}
    labels: list[str] = []
    for i, (pattern, overrides) in enumerate(pairs):
        _check_arguments(make, overrides, f"rule {i}, {pattern!r}")
        settings = {**defaults, **overrides}
        same = [label for label, other in groups.items() if _same(other, settings)]
        labels.append(same[0] if same else f"rule_{i}")
        groups.setdefault(labels[-1], settings)

    def label_tree(tree: Any) -> Any:
        """The label of every parameter, by nothing but its path."""
        paths, _, treedef = _flatten(tree)
        chosen = [_first_match(path, pairs) for path in paths]
        # optax.tree_map_params comes with a tree without leaves.
        if paths:
            _check_all_decide(pairs, set(chosen), paths)
        return treedef.unflatten(
            ["default" if i is None else labels[i] for i in chosen]
        )

    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: make(**settings) for label, settings in groups.items()
    }
    return optax.partition(transforms, label_tree)


def state_table(tx: optax.GradientTransformation, params: Any) -> str:
    """Which state an optimizer holds for each parameter, as a table to print.

    Nothing is computed or allocated. State belongs to a parameter where it lies in a
    tree like the parameters' own; the rest, such as counts, is in the line "other". For
    parameters that are one bare array, its state is what has as many axes.

    Args:
        tx: any Optax transformation.
        params: arrays, ``jax.ShapeDtypeStruct``, or an ``nnx.State``.

    Returns:
        A line for each parameter: path, shape, dtype, the dtypes of its state, and the
        bytes of its state, in all and for each element of the parameter.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> params = {"kernel": jnp.ones((64, 1024)), "bias": jnp.ones(1024)}
        >>> print(jaxbnb.optim.state_table(jaxbnb.adamw8bit(1e-3), params))
        parameter  shape       dtype    state            bytes  per element
        bias       (1024,)     float32  float32           8192         8.00
        kernel     (64, 1024)  float32  uint8, float32  133120         2.03
        other                           int32                4
        total                                           141316         2.12
        >>> print(jaxbnb.optim.state_table(optax.sgd(1e-3), params))
        parameter  shape       dtype    state  bytes  per element
        bias       (1024,)     float32  -          0         0.00
        kernel     (64, 1024)  float32  -          0         0.00
        total                                      0         0.00
    """
    params = jax.eval_shape(lambda tree: tree, params)
    paths, leaves, treedef = _flatten(params)
    places = treedef.unflatten(range(len(leaves)))

    def is_params_like(node: Any) -> bool:
        return _beside(node, places) is not None

    held: list[list[Any]] = [[] for _ in leaves]
    other: list[Any] = []
    state = jax.eval_shape(tx.init, params)
    for node in jax.tree.leaves(state, is_leaf=is_params_like):
        pairs = _beside(node, places)
        # Every array is like a bare array.
        if pairs is None or (node is pairs[0][0] and node.ndim != leaves[0].ndim):
            other.append(node)
            continue
        for leaf, place in pairs:
            held[place].append(leaf)
    rows = [("parameter", "shape", "dtype", "state", "bytes", "per element")]
    for path, leaf, mine in zip(paths, leaves, held, strict=True):
        columns = (path, str(leaf.shape), str(leaf.dtype), _dtypes(mine) or "-")
        rows.append((*columns, *_bytes(mine, leaf.size)))
    if other:
        rows.append(("other", "", "", _dtypes(other), *_bytes(other, 0)))
    elements = sum(leaf.size for leaf in leaves)
    rows.append(("total", "", "", "", *_bytes((held, other), elements)))
    return _layout(rows)


def _beside(node: Any, places: Any) -> list[tuple[Any, int]] | None:
    """The arrays of a piece of state, each with the place of its parameter.

    Args:
        node: the piece; `optax.MaskedNode` may stand for any part of the parameters.
        places: the parameters' tree with their places in it.

    Returns:
        None unless ``node`` is such a tree, with at least one array.
    """
    states, structure = jax.tree.flatten(node, is_leaf=_is_masked)
    try:
        beside = structure.flatten_up_to(places)
    except (TypeError, ValueError):
        return None
    pairs = [(s, p) for s, p in zip(states, beside, strict=True) if not _is_masked(s)]
    return pairs if pairs and all(isinstance(p, int) for _, p in pairs) else None


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The dotted path of every leaf, the leaves, and the structure.

    The same for an ``nnx.State`` of variables and one of plain arrays, as
    ``nnx.Optimizer`` calls ``init`` with the one and ``update`` with the other.
    """
    leaves, treedef = jax.tree.flatten(tree)
    boxes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, _BOXES)
    )
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, box in boxes
        for _ in jax.tree.leaves(box)
    ]
    return paths, leaves, treedef


def _first_match(path: str, pairs: Sequence[tuple[Pattern, Overrides]]) -> int | None:
    return next((i for i, (p, _) in enumerate(pairs) if matches(path, p)), None)


def _check_rules(rules: Any) -> list[tuple[Pattern, Overrides]]:
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"rule {i} must be a pair of a pattern and its overrides; got {pair!r}"
            )
        pattern, overrides = pair
        if not isinstance(overrides, Mapping):
            raise ValueError(
                f"the overrides of rule {i}, {pattern!r}, must be a dict of keyword "
                f"arguments; got {overrides!r}"
            )
        if isinstance(pattern, str) and pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"the pattern of rule {i}, {pattern!r}, is no regular expression: "
                    f"{error}; give names as a list"
                ) from error
            continue
        names = pattern if isinstance(pattern, Sequence) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"the pattern of rule {i} must be a list of names or one regular "
                f"expression; got {pattern!r}"
            )
    return pairs


def _check_all_decide(
    pairs: Sequence[tuple[Pattern, Overrides]], decided: set, paths: Sequence[str]
) -> None:
    for i, (pattern, _) in enumerate(pairs):
        if i in decided:
            continue
        if any(matches(path, pattern) for path in paths):
            raise ValueError(
                f"rule {i}, {pattern!r}, decides for no parameter: earlier rules match "
                "all that it does, and the first match wins"
            )
        some = ", ".join(map(repr, paths[:6]))
        more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
        raise ValueError(
            f"rule {i}, {pattern!r}, matches none of the parameters {some}{more}. A "
            "string is a regular expression for the whole path; a list has names, each "
            "the whole path or its last parts"
        )


def _check_arguments(make: Callable, arguments: Overrides, whose: str) -> None:
    """Raises TypeError for what ``make`` does not take by name."""
    taken: list[str] = []
    for p in inspect.signature(make).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            taken.append(p.name)
        elif p.kind is p.VAR_KEYWORD:
            fields = next(iter(typing.get_args(p.annotation)), None)
            if not (isinstance(fields, type) and typing.is_typeddict(fields)):
                return  # Any name at all, so `make` has to say.
            taken += fields.__annotations__
    for name in arguments:
        if name not in taken:
            raise TypeError(
                f"{getattr(make, '__name__', make)} takes no argument {name!r}, of "
                f"{whose}; it takes {', '.join(taken)}"
            )


def _same(a: Overrides, b: Overrides) -> bool:
    """Whether settings are the same: arrays and functions only if the same object."""

    def same(x: Any, y: Any) -> bool:
        plain = isinstance(x, bool | int | float | str) and type(x) is type(y)
        return x is y or (plain and x == y)

    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _dtypes(leaves: Sequence[Any]) -> str:
    """Each dtype once; arrays without elements, which stand for none, left out."""
    return ", ".join(dict.fromkeys(str(leaf.dtype) for leaf in leaves if leaf.size))


def _bytes(tree: Any, elements: int) -> tuple[str, str]:
    total = tree_nbytes(tree)
    return str(total), f"{total / elements:.2f}" if elements else ""


def _layout(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns two spaces apart, numbers, the last two, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *texts, count, ratio in rows:
        cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
        cells += [count.rjust(widths[-2]), ratio.rjust(widths[-1])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
