"""Ordered rules from parameter paths to settings, and the paths of parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import jax
from flax import nnx

from jaxbnb.core import QuantizedArray
from jaxbnb.core.paths import matches

Pattern = str | Sequence[str]
Overrides = Mapping[str, Any]

# What wraps one array. The last key of such a path is not part of a parameter's name.
_BOXES = (nnx.Variable, flax.core.meta.AxisMetadata)


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The dotted path of every leaf, the leaves, and the structure.

    Paths are the same for an ``nnx.State`` of variables and one of plain arrays:
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


def refuse_quantized(params: Any) -> None:
    """Raises TypeError for a quantised array among parameters, because it is frozen."""

    def is_quantized(x):
        # One without parts is what a filter for trainable arrays has left of it.
        return isinstance(x, QuantizedArray) and bool(jax.tree.leaves(x))

    found, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: is_quantized(x) or isinstance(x, _BOXES)
    )
    for path, box in found:
        if any(map(is_quantized, jax.tree.leaves(box, is_leaf=is_quantized))):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise TypeError(
                f"{name!r} is quantised, and frozen. Train the rest: the first tree of "
                "jaxbnb.linen.split_quantized(params), or nnx.state(model, nnx.Param); "
                "with nnx.Optimizer, give wrt=nnx.Param or wrt=nnx.LoRAParam"
            )


def keep_32_bits(tree: Any) -> list[bool]:
    """Whether the box of each leaf says ``state_bits=32``.

    Raises:
        ValueError: a box says another number.
    """
    kept = []
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, _BOXES))
    for box in boxes:
        bits = _declared(box)
        if bits not in (None, 32):
            raise ValueError(
                f"a parameter declares state_bits={bits!r}; it may declare 32, and the "
                "optimizer chooses among fewer"
            )
        kept += [bits == 32] * len(jax.tree.leaves(box))
    return kept


def like_boxed(tree: Any, other: Any) -> Any:
    """A tree without its boxes, unless another tree has some."""

    def is_box(x):
        return isinstance(x, _BOXES)

    def unbox(node):
        if is_box(node):
            (node,) = jax.tree.leaves(node)
        return node

    if any(map(is_box, jax.tree.leaves(other, is_leaf=is_box))):
        return tree
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def _declared(box: Any) -> Any:
    """The ``state_bits`` of a parameter's box, or of a box inside it."""
    if isinstance(box, nnx.Variable):
        return box.get_metadata().get("state_bits")
    if isinstance(box, flax.core.meta.AxisMetadata):
        inside = getattr(box, "value", None)
        return getattr(box, "state_bits", None) or _declared(inside)
    return None


def check_rules(rules: Any) -> list[tuple[Pattern, Overrides]]:
    """The rules as pairs, from a sequence or a dict.

    Raises:
        ValueError: one is not a pair of a pattern and a dict.
    """
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
                    f"the pattern of rule {i}, {pattern!r}, is not a regular "
                    f"expression: {error}; give names as a list"
                ) from error
            continue
        names = pattern if isinstance(pattern, Sequence) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"the pattern of rule {i} must be a list of names or one regular "
                f"expression; got {pattern!r}"
            )
    return pairs


def match_paths(paths: Sequence[str], patterns: Sequence[Pattern]) -> list[int | None]:
    """The index of the first pattern that matches each path; None without one.

    Raises:
        ValueError: a pattern decides for none of the paths.
    """

    def first(path):
        return next((i for i, p in enumerate(patterns) if matches(path, p)), None)

    chosen = [first(path) for path in paths]
    # optax.tree_map_params comes with a tree without leaves.
    for i, pattern in enumerate(patterns if paths else ()):
        if i in chosen:
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
    return chosen
