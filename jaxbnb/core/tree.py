"""Quantised weights in plain pytrees, for functions of parameters of any framework."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.config import QuantConfig, as_config
from jaxbnb.core.paths import matches
from jaxbnb.core.rules import FORM, Report, Rule, check_rules

# Smaller matrices save little; `Report` has the same limit.
_SMALLEST: Final = 4096
# Names of leaves that look up rows, or are the head, in most frameworks.
_SKIP: Final = r".*(embed|lm_head|logits|unembed).*"


def quantize_tree(
    params: Any,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = _SKIP,
    axis: Literal[-2, -1] = -2,
) -> Any:
    """Quantises the weights of a pytree; any function of parameters can use them.

    A leaf is quantised if it is a floating array with at least two axes and 4,096
    elements, unless ``skip`` names it. Everything else stays as it is: biases, norms,
    integers, random keys. `decode_tree` gives a function the tree that it knows.

    Args:
        params: any pytree of arrays, or of their shapes (``jax.ShapeDtypeStruct``).
        config: format of the weights, or its name.
        rules: ``(leaves, config)`` pairs, which come before ``config`` and ``skip``.
            The first one that names a leaf decides its format; None leaves it alone. A
            leaf's name is its dotted path.
        skip: leaves to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. By default, what is called an
            embedding, logits or head.
        axis: axis that blocks run along: the one that products sum over. In Flax, Haiku
            and Keras, kernels are ``(in, out)``, so it is -2. In Equinox and PyTorch
            they are ``(out, in)``: -1.

    Returns:
        The same tree with a `QuantizedArray` for each quantised leaf. `tree_report`
        lists them, and what was left alone.

    Raises:
        TypeError: ``rules`` are not pairs, a format is neither a config nor a name, or
            a leaf is an array that JAX does not take.
        ValueError: no leaf was quantised, all are quantised already, a rule does not
            name any leaf, or ``axis`` is another one.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> params = {"linear": {"w": jnp.ones((64, 128)), "b": jnp.ones(128)}}
        >>> tree = jaxbnb.quantize_tree(params, "nf4")
        >>> tree["linear"]["w"].quant_type, tree["linear"]["b"].shape
        ('nf4', (128,))
        >>> jaxbnb.decode_tree(tree)["linear"]["w"].shape
        (64, 128)
    """
    check_rules(rules, FORM)
    if axis not in (-2, -1):
        raise ValueError(f"axis must be -2 or -1, got {axis!r}")
    default = as_config(config)
    choices = [None if choice is None else as_config(choice) for _, choice in rules]
    deciding: set[int] = set()

    def quantize(path: Any, leaf: Any) -> Any:
        name = path_of(path)
        if not _is_weight(name, leaf):
            return leaf
        named = (i for i, (names, _) in enumerate(rules) if matches(name, names))
        first = next(named, None)
        if first is None:
            is_left = leaf.size < _SMALLEST or matches(name, skip)
            chosen = None if is_left else default
        else:
            deciding.add(first)
            chosen = choices[first]
        if chosen is None:
            return leaf
        make = chosen.quantize_kernel if axis == -2 else chosen.quantize_embedding
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(make, leaf)
        return make(leaf)

    tree = jax.tree_util.tree_map_with_path(quantize, params, is_leaf=is_quantized)
    for number, (names, _) in enumerate(rules):
        if number not in deciding:
            raise ValueError(
                f"no weight of the tree is called {names!r}; it has "
                f"{', '.join(_list_weights(params)) or 'none'}"
            )
    report = tree_report(tree)
    if report == tree_report(params) != []:
        raise ValueError(
            f"the tree is quantised already: {', '.join(report)}. To change formats, "
            "decode it first, with decode_tree"
        )
    if not report:
        raise ValueError(
            "the tree has no weight to quantise: a floating array with at least two "
            f"axes and {_SMALLEST} elements that skip does not name. It has "
            f"{', '.join(_list_weights(params)) or 'no floating matrices'}"
        )
    return tree


def decode_tree(
    tree: Any, adapters: Mapping[str, Any] | None = None, *, scaling: float = 1.0
) -> Any:
    """Decodes the weights of `quantize_tree`, with the update of adapters if given.

    Call it inside the function that is differentiated, under ``jax.checkpoint``: the
    backward pass then decodes the weights again, instead of keeping them.

    Args:
        tree: a tree with quantised leaves.
        adapters: factors of `jaxbnb.lora.lora_tree`, by path.
        scaling: factor of the adapters' update, ``alpha / r``.

    Returns:
        The tree with plain arrays, in the dtypes that they had before.

    Raises:
        ValueError: ``adapters`` name leaves that the tree does not have, or their
            update has another shape.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> def apply(params, x):
        ...     return x @ params["w"]
        >>> tree = jaxbnb.quantize_tree({"w": jnp.ones((64, 64))}, "nf4")
        >>> adapters = jaxbnb.lora.lora_tree(tree, r=4, key=jax.random.key(0))
        >>> @jax.checkpoint
        ... def loss(adapters, x):
        ...     return jnp.sum(apply(jaxbnb.decode_tree(tree, adapters), x) ** 2)
        >>> grads = jax.grad(loss)(adapters, jnp.ones((2, 64)))
        >>> {name: grad.shape for name, grad in grads["w"].items()}
        {'lora_a': (64, 4), 'lora_b': (4, 64)}
    """
    left = dict(adapters or {})

    def decode(path: Any, leaf: Any) -> Any:
        array = leaf.dequantize() if is_quantized(leaf) else leaf
        factors = left.pop(path_of(path), None)
        if factors is None:
            return array
        update = jnp.matmul(
            factors["lora_a"],
            factors["lora_b"],
            preferred_element_type=jnp.float32,
        )
        if update.shape != array.shape:
            raise ValueError(
                f"{path_of(path)} has shape {array.shape}, and the update of its "
                f"adapters {update.shape}; they belong to another tree"
            )
        return (array + (scaling * update).astype(array.dtype)).astype(array.dtype)

    decoded = jax.tree_util.tree_map_with_path(decode, tree, is_leaf=is_quantized)
    if left:
        raise ValueError(
            f"the tree has no leaves {', '.join(left)}, which the adapters are for"
        )
    return decoded


def tree_report(tree: Any) -> Report:
    """Lists the quantised leaves of a tree, and the large ones that were left alone.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> params = {"w": jnp.ones((64, 64)), "embed": jnp.ones((512, 64))}
        >>> report = jaxbnb.core.tree_report(jaxbnb.quantize_tree(params, "int8"))
        >>> report, report.left_alone
        (['w'], {'embed': (512, 64)})
    """
    leaves = {
        path_of(path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
    }
    rest = {name: leaf for name, leaf in leaves.items() if _is_weight(name, leaf)}
    return Report([name for name, leaf in leaves.items() if is_quantized(leaf)], rest)


def path_of(path: Any) -> str:
    """Returns the dotted path of a leaf; slashes in the keys of Haiku become dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")


def is_quantized(x: Any) -> bool:
    """Whether a leaf is a `QuantizedArray`."""
    return isinstance(x, QuantizedArray)


def _is_weight(name: str, leaf: Any) -> bool:
    if is_quantized(leaf) or not hasattr(leaf, "dtype"):
        return False
    try:
        is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    except TypeError as error:
        raise TypeError(
            f"{name} is a {type(leaf).__module__}.{type(leaf).__qualname__}; leaves "
            "are arrays of JAX or NumPy"
        ) from error
    return is_floating and len(leaf.shape) >= 2


def _list_weights(params: Any) -> list[str]:
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
    return [path_of(path) for path, leaf in leaves if _is_weight(path_of(path), leaf)]
