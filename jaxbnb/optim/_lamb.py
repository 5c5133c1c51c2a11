"""LAMB with the moments of its Adam in 8 bits."""

from typing import Unpack

import jax
import optax

from jaxbnb.optim._adam import scale_by_adam8bit
from jaxbnb.optim._arguments import MaskOrFn, Storage, takes_storage
from jaxbnb.optim._forms import paged_form
from jaxbnb.optim._trust_ratio import scale_by_trust_ratio


@takes_storage
def lamb8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """LAMB, the paper's trust ratio, with 8-bit moments.

    Args:
        learning_rate: fixed value or schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        weight_decay: strength of the decay, within the trust ratio.
        mask: which parameters to decay, as in `adamw8bit`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.lamb8bit(1e-2)
        >>> params = jnp.full((64, 64), 2.0)
        >>> updates, _ = tx.update(jnp.ones((64, 64)), tx.init(params), params)
        >>> round(float(updates[0, 0]), 4)
        -0.02

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76
        minutes, 2020.
    """
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps, eps_root, **storage),
        optax.add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        optax.scale_by_learning_rate(learning_rate),
    )


paged_lamb8bit = paged_form(lamb8bit)
