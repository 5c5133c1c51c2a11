"""Lion with its momentum in 8 bits."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import MaskOrFn, Storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form
from jaxbnb_kernels.update_8bit import Rule


class ScaleByLion8bitState(NamedTuple):
    """The state of `scale_by_lion8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        mu: momentum: codes of the signed dynamic map, or float32 values.
        mu_absmax: absmax of its blocks; one zero where the values are float32.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates
    mu_absmax: optax.Updates


@takes_storage
def scale_by_lion8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by Lion, with its momentum held in 8 bits.

    Each step decodes the momentum, computes `optax.scale_by_lion` in float32, and
    encodes it again:

    .. math::
        u = \operatorname{sign}(b_1 m + (1 - b_1) g), \quad
        m \leftarrow b_2 m + (1 - b_2) g

    Args:
        b1: weight of the momentum in the update.
        b2: decay rate of the momentum.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByLion8bitState`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_lion8bit()
        >>> updates, state = tx.update(-jnp.ones(4096), tx.init(jnp.ones(4096)))
        >>> updates[0].item(), state.mu.dtype.name
        (-1.0, 'uint8')

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """
    return elementwise(
        ScaleByLion8bitState,
        (MomentSpec("mu", signed=True),),
        Rule(_advance, _direction),
        lambda count: as_float32(
            b1=b1, one_minus_b1=1 - b1, b2=b2, one_minus_b2=1 - b2
        ),
        optax.scale_by_lion(b1, b2),
        **storage,
    )


@takes_storage
def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: MaskOrFn = None,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """Lion with an 8-bit momentum: one byte of state a parameter.

    Args:
        learning_rate: fixed value or schedule. Commonly 3 to 10 times smaller than
            Adam's.
        b1: weight of the momentum in the update.
        b2: decay rate of the momentum.
        weight_decay: strength of the decoupled decay, times the learning rate.
        mask: which parameters to decay, as in `adamw8bit`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.lion8bit(1e-4, weight_decay=0.0)
        >>> params = jnp.ones((64, 64))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> round(float(updates[0, 0]), 6)
        -0.0001

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """
    scale = scale_by_lion8bit(b1, b2, **storage)
    return optimizer(scale, learning_rate, weight_decay, mask)


paged_lion8bit = paged_form(lion8bit)


def _advance(s, g, old):
    (mu,) = old
    return (s["b2"] * mu + s["one_minus_b2"] * g,)


def _direction(s, g, old, new):
    del new
    (mu,) = old
    return jnp.sign(s["one_minus_b1"] * g + s["b1"] * mu)
