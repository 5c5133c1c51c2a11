"""SGD with its momentum in 8 bits, and LARS on top of it."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import MaskOrFn, Storage, chosen_storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form
from jaxbnb.optim._trust_ratio import scale_by_trust_ratio
from jaxbnb_kernels.update_8bit import Rule


class Trace8bitState(NamedTuple):
    """The state of `trace8bit`: parallel trees of plain arrays.

    Attributes:
        count: steps taken.
        trace: momentum: codes of the signed dynamic map, or float32 values.
        trace_absmax: absmax of its blocks; one zero where the values are float32.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: optax.Updates
    trace_absmax: optax.Updates


@takes_storage
def trace8bit(
    decay: jax.typing.ArrayLike,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Heavy-ball or Nesterov momentum, held in 8 bits.

    Each step decodes the trace, computes `optax.trace` in float32, and encodes it
    again:

    .. math::
        t \leftarrow d\, t + (1 - \text{dampening})\, g, \quad
        u = t \;\text{ or, with Nesterov, }\; g + d\, t

    Args:
        decay: decay rate :math:`d`.
        nesterov: look one step ahead.
        dampening: part of the gradient that is left out from the second step on. The
            first gradient enters in full, as in ``torch.optim.SGD``.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `Trace8bitState`.

    Raises:
        NotImplementedError: ``dampening`` is not zero and ``state_bits`` is not 8.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.trace8bit(0.5)
        >>> grads = jnp.ones(4096)
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, state = tx.update(grads, state)
        >>> updates[0].item()
        1.5

    References:
        Sutskever et al., On the Importance of Initialization and Momentum in Deep
        Learning, 2013.
    """
    if chosen_storage(storage).get("state_bits", 8) != 8 and not _is_zero(dampening):
        raise NotImplementedError(
            "optax.trace does not have dampening, so it needs state_bits=8; got "
            f"state_bits={storage.get('state_bits')!r}, dampening={dampening!r}"
        )

    def scalars(count):
        fresh = jnp.where(count == 1, 1.0, 1 - jnp.asarray(dampening, jnp.float32))
        return as_float32(decay=decay, fresh=fresh)

    return elementwise(
        Trace8bitState,
        (MomentSpec("trace", signed=True),),
        Rule(_advance, _nesterov if nesterov else _heavy_ball),
        scalars,
        optax.trace(decay, nesterov),
        **storage,
    )


@takes_storage
def sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    dampening: jax.typing.ArrayLike = 0.0,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """SGD with an 8-bit momentum: one byte of state a parameter.

    Args:
        learning_rate: fixed value or schedule.
        momentum: decay rate of the momentum. SGD without momentum has no state to hold;
            that is `optax.sgd`.
        nesterov: look one step ahead.
        dampening: part of the gradient to leave out; see `trace8bit`.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.sgd8bit(0.1, momentum=0.9, nesterov=True)
        >>> grads = jnp.ones((64, 64))
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> round(float(updates[0, 0]), 6)
        -0.19

    References:
        Sutskever et al., On the Importance of Initialization and Momentum in Deep
        Learning, 2013.
    """
    scale = trace8bit(momentum, nesterov, dampening, **storage)
    return optimizer(scale, learning_rate)


@takes_storage
def lars8bit(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = True,
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    eps: jax.typing.ArrayLike = 0.0,
    trust_ratio_mask: MaskOrFn = True,
    momentum: jax.typing.ArrayLike = 0.9,
    nesterov: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """LARS, the paper's trust ratio, with an 8-bit momentum.

    Args:
        learning_rate: fixed value or schedule.
        weight_decay: strength of the decay, added to the gradient.
        weight_decay_mask: which parameters to decay.
        trust_coefficient: factor of the trust ratio.
        eps: number added to the denominator of the ratio.
        trust_ratio_mask: which parameters are scaled by the ratio.
        momentum: decay rate of the momentum.
        nesterov: look one step ahead.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.lars8bit(1.0)
        >>> params = jnp.full((64, 64), 2.0)
        >>> updates, _ = tx.update(jnp.ones((64, 64)), tx.init(params), params)
        >>> round(float(updates[0, 0]), 6)
        -0.002

    References:
        You et al., Large Batch Training of Convolutional Networks, 2017.
    """
    ratio = scale_by_trust_ratio(trust_coefficient, eps)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        optax.masked(ratio, trust_ratio_mask),
        optax.scale_by_learning_rate(learning_rate),
        trace8bit(momentum, nesterov, **storage),
    )


paged_sgd8bit = paged_form(sgd8bit)
paged_lars8bit = paged_form(lars8bit)


def _is_zero(x: jax.typing.ArrayLike) -> bool:
    return isinstance(x, int | float) and x == 0


def _advance(s, g, old):
    (trace,) = old
    return (s["fresh"] * g + s["decay"] * trace,)


def _heavy_ball(s, g, old, new):
    del s, g, old
    (trace,) = new
    return trace


def _nesterov(s, g, old, new):
    del old
    (trace,) = new
    return g + s["decay"] * trace
