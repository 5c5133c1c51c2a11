"""RMSprop, plain and centered, with its moments in 8 bits."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import Storage, chosen_storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form
from jaxbnb.optim._momentum import trace8bit
from jaxbnb_kernels.update_8bit import Rule


class ScaleByRms8bitState(NamedTuple):
    """The state of `scale_by_rms8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        nu: second moment: codes of the unsigned dynamic map, or float32 values.
        nu_absmax: absmax of its blocks; one zero where the values are float32.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: optax.Updates
    nu_absmax: optax.Updates


class ScaleByStddev8bitState(NamedTuple):
    """The state of `scale_by_stddev8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        mu: first moment: codes of the signed dynamic map, or float32 values.
        nu: second moment: codes of the unsigned dynamic map, or float32 values.
        mu_absmax: absmax of the blocks of ``mu``; one zero where they are float32.
        nu_absmax: absmax of the blocks of ``nu``.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates
    nu: optax.Updates
    mu_absmax: optax.Updates
    nu_absmax: optax.Updates


@takes_storage
def scale_by_rms8bit(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by the root of their mean square, held in 8 bits.

    Each step decodes the moment, computes `optax.scale_by_rms` in float32, and encodes
    it again:

    .. math::
        v \leftarrow d v + (1 - d) g^2, \quad u = g / \sqrt{v + \varepsilon}

    Args:
        decay: decay rate :math:`d`.
        eps: added inside the square root, or outside.
        initial_scale: initial value of the moment.
        eps_in_sqrt: whether ``eps`` is added inside.
        bias_correction: divide the moment by :math:`1 - d^t`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByRms8bitState`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_rms8bit(decay=0.75)
        >>> updates, _ = tx.update(jnp.full(4096, 3.0), tx.init(jnp.ones(4096)))
        >>> round(float(updates[0]), 4)
        2.0

    References:
        Hinton, Neural Networks for Machine Learning, lecture 6, 2012.
    """
    return elementwise(
        ScaleByRms8bitState,
        (MomentSpec("nu", False, initial_scale),),
        Rule(_advance_nu, _by_rms_inside if eps_in_sqrt else _by_rms),
        lambda count: _scalars(count, decay, eps, bias_correction),
        optax.scale_by_rms(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        **storage,
    )


@takes_storage
def scale_by_stddev8bit(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by their standard deviation, its moments held in 8 bits.

    Each step decodes the moments, computes `optax.scale_by_stddev` in float32, and
    encodes them again. There is one difference: a variance below a sixteenth of the
    mean square, which is less than the rounding of the moments, counts as a sixteenth.
    So a step is at most four times as long as with `scale_by_rms8bit`:

    .. math::
        u = g / \sqrt{\max(v - m^2, v / 16) + \varepsilon}

    Args:
        decay: decay rate of both moments.
        eps: added inside the square root, or outside.
        initial_scale: initial value of the second moment.
        eps_in_sqrt: whether ``eps`` is added inside.
        bias_correction: divide the moments by :math:`1 - d^t`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByStddev8bitState`.

    Raises:
        NotImplementedError: ``state_bits`` is 4 or "fp8".

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_stddev8bit(decay=0.5)
        >>> updates, _ = tx.update(jnp.full(4096, 3.0), tx.init(jnp.ones(4096)))
        >>> round(float(updates[0]), 4)
        2.0

    References:
        Graves, Generating Sequences With Recurrent Neural Networks, 2013.
    """
    if chosen_storage(storage).get("state_bits", 8) not in (8, 32):
        raise NotImplementedError(
            "the difference of moments rounded to so few bits is not a variance; "
            f"centered needs state_bits=8 or 32; got {storage.get('state_bits')!r}"
        )
    return elementwise(
        ScaleByStddev8bitState,
        (MomentSpec("mu", True), MomentSpec("nu", False, initial_scale)),
        Rule(_advance_both, _by_stddev_inside if eps_in_sqrt else _by_stddev),
        lambda count: _scalars(count, decay, eps, bias_correction),
        optax.scale_by_stddev(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        **storage,
    )


@takes_storage
def rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """RMSprop with 8-bit moments: one byte of state a parameter for each moment.

    Args:
        learning_rate: fixed value or schedule.
        decay: decay rate of the moments.
        eps: added inside the square root, or outside.
        initial_scale: initial value of the second moment.
        eps_in_sqrt: whether ``eps`` is added inside.
        centered: rescale by the standard deviation, which takes one more moment; see
            `scale_by_stddev8bit`.
        momentum: decay rate of an 8-bit momentum of the updates; None for no momentum.
        nesterov: use Nesterov's form of that momentum.
        bias_correction: correct the moments for their start.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Raises:
        ValueError: ``nesterov`` without ``momentum``.
        NotImplementedError: ``centered`` with ``state_bits`` other than 8 or 32.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.rmsprop8bit(0.1, decay=0.75, momentum=0.9)
        >>> grads = jnp.ones((64, 64))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> round(float(updates[0, 0]), 4)
        -0.2

    References:
        Hinton, Neural Networks for Machine Learning, lecture 6, 2012.
    """
    if nesterov and momentum is None:
        raise ValueError("nesterov=True needs a momentum, e.g. momentum=0.9")
    make = scale_by_stddev8bit if centered else scale_by_rms8bit
    scale = make(decay, eps, initial_scale, eps_in_sqrt, bias_correction, **storage)
    tx = optimizer(scale, learning_rate)
    if momentum is None:
        return tx
    return optax.chain(tx, trace8bit(momentum, nesterov, **storage))


paged_rmsprop8bit = paged_form(rmsprop8bit)


def _scalars(count, decay, eps, bias_correction):
    remaining = decay ** count.astype(jnp.float32) if bias_correction else 0.0
    return as_float32(
        decay=decay, one_minus_decay=1 - decay, eps=eps, correction=1 / (1 - remaining)
    )


def _advance_nu(s, g, old):
    (nu,) = old
    return (s["decay"] * nu + s["one_minus_decay"] * g * g,)


def _advance_both(s, g, old):
    mu, nu = old
    return s["decay"] * mu + s["one_minus_decay"] * g, *_advance_nu(s, g, (nu,))


def _variance(s, new):
    mu, nu = new
    mean, square = mu * s["correction"], nu * s["correction"]
    return jnp.maximum(square - mean * mean, square / 16)


def _by_rms_inside(s, g, old, new):
    del old
    return jax.lax.rsqrt(new[0] * s["correction"] + s["eps"]) * g


def _by_rms(s, g, old, new):
    del old
    return g / (jnp.sqrt(new[0] * s["correction"]) + s["eps"])


def _by_stddev_inside(s, g, old, new):
    del old
    return jax.lax.rsqrt(_variance(s, new) + s["eps"]) * g


def _by_stddev(s, g, old, new):
    del old
    return g / (jnp.sqrt(_variance(s, new)) + s["eps"])
