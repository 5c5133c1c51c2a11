"""Whether a transformation steps each parameter by itself."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.interpreters import partial_eval

from jaxbnb.optim.rules import flatten_with_paths


def check_separate(
    tx: optax.GradientTransformation, params: Any, owners: Sequence[int | None]
) -> None:
    """Raises if the step of one parameter needs what belongs to another.

    The step is traced once. JAX's elimination of dead code then tells what the results
    of a group of parameters need. A group has all indices with a certain bit set, or
    not set, because any two indices differ in some bit. If ``tx.update`` needs
    more than gradients, state and parameters, nothing is known before it is called.

    Args:
        tx: the transformation.
        params: its parameters, or their shapes.
        owners: index of the parameter that each array of its state belongs to; None for
            one that is shared.

    Raises:
        ValueError: the step mixes parameters.
    """
    paths, shapes, structure = flatten_with_paths(_shapes(params))
    count = len(paths)
    if count < 2:
        return
    tree = structure.unflatten(shapes)
    state = jax.eval_shape(tx.init, tree)
    try:
        # The results are not kept, so their dtypes do not matter.
        with jax.numpy_dtype_promotion("standard"):
            jaxpr = jax.make_jaxpr(tx.update)(tree, state, tree).jaxpr
    except (TypeError, ValueError):
        return
    results = [*range(count), *owners]
    arguments = [*range(count), *owners, *range(count)]

    def needed_by(wanted: Any) -> set[int]:
        used = partial_eval.dce_jaxpr(jaxpr, [wanted(owner) for owner in results])[1]
        owned = zip(arguments, used, strict=True)
        return {owner for owner, is_used in owned if is_used and owner is not None}

    for index in needed_by(lambda owner: owner is None):
        raise ValueError(_message("its shared state", paths[index]))
    for bit in range((count - 1).bit_length()):
        for side in (0, 1):

            def chosen(owner, bit=bit, side=side):
                return owner is not None and owner >> bit & 1 == side

            for index in needed_by(chosen):
                if not chosen(index):
                    raise ValueError(_message("the step of others", paths[index]))


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda tree: tree, tree)


def _message(what: str, path: str) -> str:
    return (
        f"tx mixes parameters: {what} needs {path!r}. Here each parameter is a step of "
        "its own, without the gradients or state of others: put what mixes them, such "
        "as optax.clip_by_global_norm or optax.apply_if_finite, around "
        "quantize_state(tx)"
    )
