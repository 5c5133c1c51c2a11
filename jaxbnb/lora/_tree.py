"""lora_tree: adapters for the weights of a plain pytree."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxbnb.core import QuantizedArray
from jaxbnb.core.paths import matches
from jaxbnb.core.tree import is_quantized, path_of


def lora_tree(
    tree: Any,
    r: int = 8,
    *,
    key: jax.Array,
    target_modules: str | Sequence[str] | None = None,
) -> dict[str, dict[str, Float32[Array, "..."]]]:
    """Makes adapters for the weights of a tree, for `jaxbnb.decode_tree`.

    A weight ``(..., in, out)`` gets ``lora_a`` ``(..., in, r)``, uniform as in PEFT,
    and ``lora_b`` ``(..., r, out)``, zeros. So nothing changes at first. The result is
    a pytree of float32 arrays, which any optimizer trains.

    Args:
        tree: parameters, such as `jaxbnb.quantize_tree` returns.
        r: the rank.
        key: random key.
        target_modules: weights to adapt: names, each a whole dotted path or its last
            parts, or one regular expression for whole paths. None for all quantised
            ones.

    Returns:
        The factors, by the weight's dotted path.

    Raises:
        ValueError: ``r`` is not positive, or nothing is selected.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> tree = jaxbnb.quantize_tree({"w": jnp.ones((64, 128))}, "nf4")
        >>> adapters = jaxbnb.lora.lora_tree(tree, r=4, key=jax.random.key(0))
        >>> adapters["w"]["lora_a"].shape, adapters["w"]["lora_b"].shape
        ((64, 4), (4, 128))

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be a positive int, got {r!r}")
    leaves = {
        path_of(path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
        if is_quantized(leaf) or getattr(leaf, "ndim", 0) >= 2
    }
    chosen = {
        name: leaf
        for name, leaf in leaves.items()
        if (
            isinstance(leaf, QuantizedArray)
            if target_modules is None
            else matches(name, target_modules)
        )
    }
    if not chosen:
        raise ValueError(
            f"target_modules={target_modules!r} selects no weight of the tree; it has "
            f"{', '.join(leaves) or 'none'}"
        )
    keys = jax.random.split(key, len(chosen))
    return {
        name: _make_factors(each, leaf.shape, r)
        for each, (name, leaf) in zip(keys, chosen.items(), strict=True)
    }


def _make_factors(
    key: jax.Array, shape: tuple[int, ...], r: int
) -> dict[str, Float32[Array, "..."]]:
    *batch, fan_in, fan_out = shape
    limit = fan_in**-0.5
    lora_a = jax.random.uniform(
        key, (*batch, fan_in, r), jnp.float32, minval=-limit, maxval=limit
    )
    return {"lora_a": lora_a, "lora_b": jnp.zeros((*batch, r, fan_out), jnp.float32)}
