"""Clipping gradients to a percentile of their own recent norms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32


class PercentileClippingState(NamedTuple):
    """The state of `percentile_clipping`: two plain arrays.

    One array holds the norms of all leaves, in the order of ``jax.tree.leaves``. So a
    step sorts once, and nothing applies a parameter's PartitionSpec, which would not
    fit, to its norms.

    Attributes:
        count: steps taken.
        squared_norms: last ``history`` squared norms of each leaf, or of the whole
            gradient; zero until the first one.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    squared_norms: Float32[Array, "norms history"]


def percentile_clipping(
    percentile: int = 5, history: int = 100, *, per_leaf: bool = True
) -> optax.GradientTransformation:
    r"""Clips a gradient to a low percentile of its last 100 norms.

    A fixed limit has to be found for every model. Here the limit is a norm that most of
    the recent gradients exceeded. Let :math:`h` be the last :math:`H` squared norms,
    including the present one, and :math:`h_{(k)}` the :math:`k`-th smallest, from 0:

    .. math::
        h_{t \bmod H} \leftarrow \lVert g \rVert^2, \quad
        c = \sqrt{h_{(\lfloor p H / 100 \rfloor)}}, \quad
        u = g \min(1, c / \lVert g \rVert)

    The first norm fills the whole history. The history records norms before clipping,
    in float32.

    A norm that is not finite, or has no finite square in float32, is not recorded, and
    its gradient passes unchanged. So the fault shows in the parameters, or in an
    `optax.apply_if_finite`, and the history stays good.

    A norm of zero is not recorded either. bitsandbytes did record it. Its limit was
    then zero and held a parameter still: for 94 steps after a first gradient of zero
    (``lora_a`` has one, because ``lora_b`` starts at zero), and for good if many
    gradients are zero.

    Args:
        percentile: which of the recent norms is the limit, 0 (the smallest) to 99.
        history: number of norms to keep, at least 2.
        per_leaf: True for a norm and a history of each leaf, as in bitsandbytes; False
            for one of the whole gradient.

    Returns:
        An ``optax.GradientTransformation`` with a `PercentileClippingState`. Updates
        have the gradients' dtypes.

    Raises:
        ValueError: ``percentile`` or ``history`` is not an int in its range, or
            ``per_leaf`` is not a bool.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> tx = optax.chain(jaxbnb.optim.percentile_clipping(5), optax.sgd(1.0))
        >>> params = {"kernel": jnp.zeros(4)}
        >>> state = tx.init(params)
        >>> for size in (1.0, 0.5, 8.0):
        ...     grads = {"kernel": jnp.full(4, size)}
        ...     updates, state = tx.update(grads, state, params)
        ...     print(float(updates["kernel"][0]))
        -1.0
        -0.5
        -1.0

    References:
        ``percentile_clipping`` of bitsandbytes' optimizers, up to its version 0.49.
    """
    _check_int("percentile", percentile, 0, 99)
    _check_int("history", history, 2, None)
    if not isinstance(per_leaf, bool):
        raise ValueError(f"per_leaf must be True or False; got {per_leaf!r}")
    index = percentile * history // 100

    def init(params: optax.Params) -> PercentileClippingState:
        norms = len(jax.tree.leaves(params)) if per_leaf else 1
        return PercentileClippingState(
            count=jnp.zeros((), jnp.int32),
            squared_norms=jnp.zeros((norms, history), jnp.float32),
        )

    def update(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        # `asarray` and not `stack`, which refuses an empty list.
        squares = jnp.asarray([_squared_norm(g) for g in leaves], jnp.float32)
        if not per_leaf:
            squares = jnp.sum(squares, keepdims=True)
        if squares.shape != state.squared_norms.shape[:1]:
            raise ValueError(
                f"the gradient has {squares.size} leaves and the state has norms of "
                f"{state.squared_norms.shape[0]}. Was it made for other parameters?"
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        kept, scales = _clip(count, state.squared_norms, squares, index)
        # With one norm every leaf has the same scale.
        scales = jnp.broadcast_to(scales, (len(leaves),))
        scaled = [_scale(g, scales[i]) for i, g in enumerate(leaves)]
        return treedef.unflatten(scaled), PercentileClippingState(count, kept)

    return optax.GradientTransformation(init, update)


def _clip(count, history, squares, index):
    """The history with the new squared norms, and the scale of each gradient."""
    recorded = jnp.isfinite(squares) & (squares > 0)
    empty = history[:, :1] == 0
    slot = jnp.arange(history.shape[1]) == count % history.shape[1]
    written = recorded[:, None] & (empty | slot)
    history = jnp.where(written, squares[:, None], history)
    limit = jnp.sqrt(jnp.sort(history, axis=1)[:, index])
    norm = jnp.sqrt(squares)
    clipped = recorded & (norm > limit)
    # Neither branch divides by zero.
    scales = jnp.where(clipped, limit, 1.0) / jnp.where(clipped, norm, 1.0)
    return history, scales


def _squared_norm(g):
    return jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32)))


def _scale(g, scale):
    """Scales in at least float32, with one rounding to the dtype of ``g``."""
    dtype = jnp.float32 if jnp.finfo(g.dtype).bits < 32 else g.dtype
    return (g.astype(dtype) * scale.astype(dtype)).astype(g.dtype)


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} must be an int {allowed}; got {value!r}")
