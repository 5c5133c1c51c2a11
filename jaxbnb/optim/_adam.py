"""Adam and AdamW with both moments in 8 bits.

A step of `adamw8bit` passes through four places:

1. Here: `_advance` and `_adam_direction` say what happens to one element, and
   `_scalars` with which numbers.
2. ``_elementwise.py``: `Optimizer` adds decay and learning rate, in ``fused_step`` as
   part of the rule. `Elementwise` takes each parameter with its codes and absmax.
3. ``state_format.py``: `StatePolicy` decided in ``init`` which moments are quantised,
   and `StateFormat` made their codes and absmax.
4. ``jaxbnb_kernels/update_8bit``: decodes a block of both moments, applies the rule and
   encodes them again, in one pass.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxbnb.optim._arguments import MaskOrFn, Storage, takes_storage
from jaxbnb.optim._elementwise import MomentSpec, as_float32, elementwise, optimizer
from jaxbnb.optim._forms import paged_form, stored_as
from jaxbnb_kernels.update_8bit import Rule


class ScaleByAdam8bitState(NamedTuple):
    """The state of `scale_by_adam8bit`: parallel trees of plain arrays.

    For a parameter with at least ``min_quantized_size`` elements, ``mu`` and ``nu``
    hold uint8 codes in its shape, and the absmax trees one float32 a block, in an array
    of the same rank. For a smaller one, ``mu`` and ``nu`` are float32 and each absmax
    is a single zero.

    Attributes:
        count: steps taken.
        mu: first moment: codes of the signed dynamic map.
        nu: second moment: codes of the unsigned dynamic map.
        mu_absmax: absmax of the blocks of ``mu``.
        nu_absmax: absmax of the blocks of ``nu``.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates
    nu: optax.Updates
    mu_absmax: optax.Updates
    nu_absmax: optax.Updates


@takes_storage
def scale_by_adam8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    r"""Rescales updates by Adam, with both moments held in 8 bits.

    Each step decodes the moments, computes `optax.scale_by_adam` in float32, and
    encodes them again:

    .. math::
        m &\leftarrow b_1 m + (1 - b_1) g, \quad
        v \leftarrow b_2 v + (1 - b_2) g^2, \\
        u &= \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t) + \bar\varepsilon} +
        \varepsilon}

    The update uses the moments before they are rounded. Zero gradients on zero moments
    never move a parameter. A non-finite gradient element shows in its own update, and
    its stored moments stay as they were.

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        nesterov: use Nesterov momentum, as `optax.scale_by_adam` does.
        **storage: ``block_size``, ``min_quantized_size``, ``state_bits``: see
            `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `ScaleByAdam8bitState`.

    Raises:
        ValueError: ``block_size`` is not a positive even int, or
            ``min_quantized_size`` is negative.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.scale_by_adam8bit()
        >>> state = tx.init({"kernel": jnp.ones((64, 1024)), "bias": jnp.ones(1024)})
        >>> jax.tree.map(lambda x: (x.dtype.name, x.shape), state.mu)
        {'bias': ('float32', (1024,)), 'kernel': ('uint8', (64, 1024))}
        >>> jax.tree.map(jnp.shape, state.mu_absmax)
        {'bias': (1,), 'kernel': (64, 4)}

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014.
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021.
    """
    return elementwise(
        ScaleByAdam8bitState,
        (MomentSpec("mu", signed=True), MomentSpec("nu", signed=False)),
        Rule(_advance, _nadam_direction if nesterov else _adam_direction),
        lambda count: _scalars(count, b1, b2, eps, eps_root),
        optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov),
        **storage,
    )


@takes_storage
def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    """Adam with 8-bit moments: two bytes of state a parameter instead of eight.

    Args:
        learning_rate: fixed value or schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        nesterov: use Nesterov momentum.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb, optax
        >>> params = jnp.ones((64, 64))
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), jaxbnb.adam8bit(1e-2))
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     loss, grads = jax.value_and_grad(lambda p: jnp.mean(p**2))(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> round(float(jnp.mean(params**2)), 4)
        0.9409
    """
    scale = scale_by_adam8bit(b1, b2, eps, eps_root, nesterov=nesterov, **storage)
    return optimizer(scale, learning_rate)


@takes_storage
def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    nesterov: bool = False,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    """AdamW with 8-bit moments: `adam8bit` with decoupled weight decay.

    The decay uses the parameter before the update, as `optax.adamw` does.

    Args:
        learning_rate: fixed value or schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added outside the square root.
        eps_root: added inside the square root.
        weight_decay: strength of the decay, multiplied with the learning rate.
        mask: pytree of bools that says which parameters decay, or a function of the
            parameters that returns one. None for all.
        nesterov: use Nesterov momentum.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.adamw8bit(1e-3, weight_decay=0.1)
        >>> params = jnp.ones((64, 64))
        >>> updates, _ = tx.update(jnp.zeros((64, 64)), tx.init(params), params)
        >>> round(float(updates[0, 0]), 6)
        -0.0001

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    scale = scale_by_adam8bit(b1, b2, eps, eps_root, nesterov=nesterov, **storage)
    return optimizer(scale, learning_rate, weight_decay, mask)


paged_adam8bit = paged_form(adam8bit)
paged_adamw8bit = paged_form(adamw8bit)
adam4bit = stored_as(adam8bit, "adam4bit", state_bits=4)
adamw4bit = stored_as(adamw8bit, "adamw4bit", state_bits=4)
adamw_fp8 = stored_as(adamw8bit, "adamw_fp8", state_bits="fp8")


def _scalars(count, b1, b2, eps, eps_root):
    """The numbers that a step multiplies and adds, in float32."""
    t = count.astype(jnp.float32)
    return as_float32(
        b1=b1,
        one_minus_b1=1 - b1,
        b2=b2,
        one_minus_b2=1 - b2,
        eps=eps,
        eps_root=eps_root,
        # Reciprocals: dividing every element would cost as much as the rest of a step.
        mu_correction=1 / (1 - b1**t),
        next_mu_correction=1 / (1 - b1 ** (t + 1)),
        nu_correction=1 / (1 - b2**t),
    )


def _advance(s, g, old):
    mu, nu = old
    mu = s["b1"] * mu + s["one_minus_b1"] * g
    nu = s["b2"] * nu + s["one_minus_b2"] * g * g
    return mu, nu


def _adam_direction(s, g, old, new):
    del g, old
    mu, nu = new
    root = jnp.sqrt(nu * s["nu_correction"] + s["eps_root"])
    return (mu * s["mu_correction"]) / (root + s["eps"])


def _nadam_direction(s, g, old, new):
    del old
    mu, nu = new
    ahead = s["b1"] * mu * s["next_mu_correction"]
    ahead = ahead + s["one_minus_b1"] * g * s["mu_correction"]
    root = jnp.sqrt(nu * s["nu_correction"] + s["eps_root"])
    return ahead / (root + s["eps"])
