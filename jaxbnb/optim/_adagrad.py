"""Adagrad with its sum of squares in 8 bits."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import Storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form
from jaxbnb_kernels.update_8bit import Rule


class ScaleByRss8bitState(NamedTuple):
    """The state of `scale_by_rss8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        sum_of_squares: codes of the unsigned dynamic map, or float32 values.
        sum_of_squares_absmax: absmax of its blocks; one zero where they are float32.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    sum_of_squares: optax.Updates
    sum_of_squares_absmax: optax.Updates


@takes_storage
def scale_by_rss8bit(
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by the root of the sum of their squares, held in 8 bits.

    Each step decodes the sum, computes `optax.scale_by_rss` in float32, and encodes it
    again:

    .. math::
        s \leftarrow s + g^2, \quad u = g / \sqrt{s + \varepsilon}

    The sum grows in cells of the map. A square below half a cell, 0.35% of the largest
    sum of its block, leaves the code as it is. The decoded sum then grows with the
    largest one, so its steps get shorter than they should be.

    Args:
        initial_accumulator_value: initial value of the sum.
        eps: added inside the square root.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByRss8bitState`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_rss8bit(initial_accumulator_value=0.0)
        >>> updates, _ = tx.update(jnp.full(4096, 3.0), tx.init(jnp.ones(4096)))
        >>> round(float(updates[0]), 6)
        1.0

    References:
        Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization, 2011.
    """
    return elementwise(
        ScaleByRss8bitState,
        (MomentSpec("sum_of_squares", False, initial_accumulator_value),),
        Rule(_advance, _direction),
        lambda count: as_float32(eps=eps),
        optax.scale_by_rss(initial_accumulator_value, eps),
        **storage,
    )


@takes_storage
def adagrad8bit(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """Adagrad with its sum of squares in 8 bits: one byte of state a parameter.

    Args:
        learning_rate: fixed value or schedule.
        initial_accumulator_value: initial value of the sum of squares.
        eps: added inside the square root.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.adagrad8bit(0.1, initial_accumulator_value=0.0)
        >>> grads = jnp.ones((64, 64))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> round(float(updates[0, 0]), 6)
        -0.1

    References:
        Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization, 2011.
    """
    scale = scale_by_rss8bit(initial_accumulator_value, eps, **storage)
    return optimizer(scale, learning_rate)


paged_adagrad8bit = paged_form(adagrad8bit)


def _advance(s, g, old):
    del s
    (total,) = old
    return (total + g * g,)


def _direction(s, g, old, new):
    del old
    (total,) = new
    return jnp.where(total > 0, jax.lax.rsqrt(total + s["eps"]), 0.0) * g
