"""An optimizer with settings by parameter path."""

import inspect
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import optax

from jaxbnb.optim._arguments import not_taken
from jaxbnb.optim.rules import (
    Overrides,
    Pattern,
    check_rules,
    flatten_with_paths,
    match_paths,
)


def per_parameter(
    make: Callable[..., optax.GradientTransformation],
    rules: Mapping[Any, Overrides] | Sequence[tuple[Pattern, Overrides]],
    **defaults: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with other settings for some parameters, chosen by path.

    The first rule that matches a parameter's dotted path decides. A parameter without
    one has the defaults. Settings are not only about precision: a rule may also change
    ``learning_rate`` or ``weight_decay``.

    The result is an `optax.partition` with one ``make(**settings)`` for each distinct
    group of settings, labelled "default" or "rule_i" by the first rule that has them.
    So a clip by global norm inside ``make`` covers only the parameters of one group.

    Args:
        make: optimizer factory, such as `jaxbnb.adamw8bit` or `optax.adamw`.
        rules: ``(pattern, overrides)`` pairs, or a dict, in order. A pattern is a list
            or tuple of names, each the whole path or its last parts, or one string: a
            regular expression that matches the whole path. Overrides are keyword
            arguments of ``make`` and replace the defaults.
        **defaults: keyword arguments of ``make`` for all parameters.

    Returns:
        An ``optax.GradientTransformationExtraArgs``. Its ``init`` and ``update`` raise
        ValueError if a rule decides for none of the parameters.

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
        dense.bias       (256,)     float32  float32           2056         8.03
        dense.kernel     (64, 256)  float32  uint8, float32   33280         2.03
        embed.embedding  (512, 64)  float32  float32         262152         8.00
        other                                int32               12
        total                                                297500         6.02

    References:
        ``GlobalOptimManager`` of bitsandbytes.
    """
    pairs = check_rules(rules)
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
        """The label of every parameter, which only its path decides."""
        paths, _, treedef = flatten_with_paths(tree)
        chosen = match_paths(paths, [pattern for pattern, _ in pairs])
        return treedef.unflatten(
            ["default" if i is None else labels[i] for i in chosen]
        )

    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: make(**settings) for label, settings in groups.items()
    }
    return optax.partition(transforms, label_tree)


def _check_arguments(make: Callable, arguments: Overrides, source: str) -> None:
    """Raises TypeError for an argument that ``make`` does not take by name."""
    taken: list[str] = []
    for p in inspect.signature(make).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            taken.append(p.name)
        elif p.kind is p.VAR_KEYWORD:
            fields = next(iter(typing.get_args(p.annotation)), None)
            if not (isinstance(fields, type) and typing.is_typeddict(fields)):
                return  # Any name may be right. Calling `make` will tell.
            taken += fields.__annotations__
    for name in arguments:
        if name not in taken:
            maker = getattr(make, "__name__", str(make))
            raise TypeError(not_taken(maker, name, taken, source))


def _same(a: Overrides, b: Overrides) -> bool:
    """Whether settings are equal. Arrays and functions are only equal to themselves."""

    def same(x: Any, y: Any) -> bool:
        plain = isinstance(x, bool | int | float | str) and type(x) is type(y)
        return x is y or (plain and x == y)

    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
