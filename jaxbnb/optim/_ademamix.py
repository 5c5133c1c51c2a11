"""AdEMAMix with its three moments in 8 bits, and its schedules."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import MaskOrFn, Storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form
from jaxbnb_kernels.update_8bit import Rule


class ScaleByAdemamix8bitState(NamedTuple):
    """The state of `scale_by_ademamix8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        m1: fast first moment: codes of the signed dynamic map, or float32 values.
        m2: slow first moment, likewise.
        nu: second moment: codes of the unsigned dynamic map, or float32 values.
        m1_absmax: absmax of the blocks of ``m1``; one zero where they are float32.
        m2_absmax: absmax of the blocks of ``m2``.
        nu_absmax: absmax of the blocks of ``nu``.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    m1: optax.Updates
    m2: optax.Updates
    nu: optax.Updates
    m1_absmax: optax.Updates
    m2_absmax: optax.Updates
    nu_absmax: optax.Updates


@takes_storage
def scale_by_ademamix8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 6.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by AdEMAMix, with its three moments held in 8 bits.

    Each step decodes the moments, computes `optax.contrib.scale_by_ademamix` in
    float32, and encodes them again:

    .. math::
        u = \frac{m_1 / (1 - b_1^t) + \alpha m_2}
        {\sqrt{v / (1 - b_2^t) + \bar\varepsilon} + \varepsilon}

    Args:
        b1: decay rate of the fast first moment.
        b2: decay rate of the second moment.
        b3: decay rate of the slow first moment; a value or a schedule, such as
            `ademamix_b3_schedule`.
        alpha: weight of the slow first moment; a value or a schedule, such as
            ``optax.linear_schedule(0.0, 5.0, steps)``.
        eps: added outside the square root.
        eps_root: added inside the square root.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByAdemamix8bitState`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_ademamix8bit(b3=0.9, alpha=5.0)
        >>> updates, _ = tx.update(jnp.ones(4096), tx.init(jnp.ones(4096)))
        >>> round(float(updates[0]), 4)
        1.5

    References:
        Pagliardini et al., The AdEMAMix Optimizer: Better, Faster, Older, 2024.
    """

    def scalars(count):
        t = count.astype(jnp.float32)
        slow = b3(count - 1) if callable(b3) else b3
        return as_float32(
            b1=b1,
            one_minus_b1=1 - b1,
            b2=b2,
            one_minus_b2=1 - b2,
            b3=slow,
            one_minus_b3=1 - slow,
            alpha=alpha(count - 1) if callable(alpha) else alpha,
            eps=eps,
            eps_root=eps_root,
            m1_correction=1 / (1 - b1**t),
            nu_correction=1 / (1 - b2**t),
        )

    return elementwise(
        ScaleByAdemamix8bitState,
        (MomentSpec("m1", True), MomentSpec("m2", True), MomentSpec("nu", False)),
        Rule(_advance, _direction),
        scalars,
        optax.contrib.scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root),
        **storage,
    )


@takes_storage
def ademamix8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """AdEMAMix with 8-bit moments: three bytes of state a parameter instead of twelve.

    Args:
        learning_rate: fixed value or schedule.
        b1: decay rate of the fast first moment.
        b2: decay rate of the second moment.
        b3: decay rate of the slow first moment; a value or a schedule.
        alpha: weight of the slow first moment; a value or a schedule.
        eps: added outside the square root.
        eps_root: added inside the square root.
        weight_decay: strength of the decoupled decay, times the learning rate.
        mask: which parameters to decay, as in `adamw8bit`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        The schedules of the paper, over 1,000 steps:

        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> tx = jaxbnb.ademamix8bit(
        ...     1e-3,
        ...     b3=jaxbnb.optim.ademamix_b3_schedule(0.9, 0.9999, 1000),
        ...     alpha=optax.linear_schedule(0.0, 5.0, 1000))
        >>> params = jnp.ones((64, 64))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> round(float(updates[0, 0]), 6)
        -0.001

    References:
        Pagliardini et al., The AdEMAMix Optimizer: Better, Faster, Older, 2024.
    """
    scale = scale_by_ademamix8bit(b1, b2, b3, alpha, eps, eps_root, **storage)
    return optimizer(scale, learning_rate, weight_decay, mask)


paged_ademamix8bit = paged_form(ademamix8bit)


def ademamix_b3_schedule(b1: float, b3: float, transition_steps: int) -> optax.Schedule:
    r"""The paper's warm-up of ``b3``: its half-life grows linearly from ``b1``'s.

    .. math::
        b_3(t) = \min\left(\exp \frac{\ln b_1 \ln b_3}
        {(1 - t/T) \ln b_3 + (t/T) \ln b_1},\; b_3\right)

    Args:
        b1: first decay rate.
        b3: last decay rate.
        transition_steps: number of steps, :math:`T`.

    Returns:
        A schedule: the decay rate as a function of the count of steps.

    Raises:
        ValueError: not ``0 < b1 <= b3 < 1``, or ``transition_steps`` is not positive.

    Example:
        >>> schedule = ademamix_b3_schedule(0.9, 0.999, 100)
        >>> [round(float(schedule(t)), 4) for t in (0, 50, 100, 200)]
        [0.9, 0.998, 0.999, 0.999]

    References:
        Pagliardini et al., The AdEMAMix Optimizer: Better, Faster, Older, 2024.
    """
    if not 0 < b1 <= b3 < 1:
        raise ValueError(f"needs 0 < b1 <= b3 < 1; got b1={b1}, b3={b3}")
    if transition_steps <= 0:
        raise ValueError(f"transition_steps must be positive; got {transition_steps}")
    log_b1, log_b3 = math.log(b1), math.log(b3)

    def schedule(count):
        part = jnp.minimum(jnp.asarray(count, jnp.float32) / transition_steps, 1.0)
        return jnp.exp(log_b1 * log_b3 / ((1 - part) * log_b3 + part * log_b1))

    return schedule


def _advance(s, g, old):
    m1, m2, nu = old
    m1 = s["b1"] * m1 + s["one_minus_b1"] * g
    m2 = s["b3"] * m2 + s["one_minus_b3"] * g
    nu = s["b2"] * nu + s["one_minus_b2"] * g * g
    return m1, m2, nu


def _direction(s, g, old, new):
    del g, old
    m1, m2, nu = new
    root = jnp.sqrt(nu * s["nu_correction"] + s["eps_root"])
    return (m1 * s["m1_correction"] + s["alpha"] * m2) / (root + s["eps"])
