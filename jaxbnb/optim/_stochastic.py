"""Stochastic rounding of 16-bit parameters."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, Key, UInt32

from jaxbnb.optim._paged import Paged, paged
from jaxbnb.optim._transformation import Definition, definition_of


def apply_updates_stochastic(
    params: optax.Params,
    updates: optax.Updates,
    key: Key[Array, ""] | UInt32[Array, "2"],
) -> optax.Params:
    r"""Adds updates to parameters, rounding 16-bit ones up or down at random.

    An update below half the spacing of a parameter's dtype, 2^-9 of a bfloat16, is lost
    when the sum is rounded to nearest. Here the sum is float32. It goes to one of its
    two neighbours in the dtype, :math:`a \le x < b`, with

    .. math:: P(x \to b) = \frac{x - a}{b - a},

    so the mean of the result is :math:`x`, and small updates add up. What float32
    itself loses, 2^-25 of the parameter, is still lost.

    Only ``bfloat16`` and ``float16`` are rounded like this. Everything else, float32
    above all, is added exactly as `optax.apply_updates` does. None is treated as there.

    From the largest finite value on, the sum has only one neighbour. It is rounded to
    nearest there, which gives that value or an infinity. NaN and infinity stay as they
    are. A device that treats float32 subnormals (below 1.2e-38) as zero, as a CPU does
    under XLA, does so with the sum.

    Args:
        params: pytree of arrays.
        updates: the same tree, of any floating dtype.
        key: new key in each step. Each leaf draws from a key of its own, derived from
            its place.

    Returns:
        The new parameters, in the dtypes of ``params``.

    Raises:
        NotImplementedError: a parameter has a float dtype of 8 bits or fewer.

    Example:
        The next bfloat16 after 1 is 1.0078. An eighth of the parameters goes there:

        >>> import jax, jax.numpy as jnp, jaxbnb, optax
        >>> params = {"w": jnp.ones(100_000, jnp.bfloat16)}
        >>> updates = {"w": jnp.full(100_000, 1e-3)}
        >>> new = jaxbnb.optim.apply_updates_stochastic(
        ...     params, updates, jax.random.key(0))
        >>> round(float(jnp.mean(new["w"].astype(jnp.float32))), 4)
        1.001
        >>> bool(jnp.all(optax.apply_updates(params, updates)["w"] == 1))
        True

    References:
        Gupta et al., Deep Learning with Limited Numerical Precision, 2015.
        Zamirai et al., Revisiting BFloat16 Training, 2021.
    """
    # None is a leaf, as for optax.apply_updates.
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    new = [
        _apply(p, u, jax.random.fold_in(key, i))
        for i, (p, u) in enumerate(
            zip(leaves, treedef.flatten_up_to(updates), strict=True)
        )
    ]
    return treedef.unflatten(new)


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: number of steps taken.
        inner_state: state of the wrapped transformation.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def stochastic_rounding(
    tx: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Makes ``tx`` round 16-bit parameters as `apply_updates_stochastic` does.

    The key of a step is made of ``seed`` and the number of the step, which is part of
    the state. So a run that goes on from a checkpoint rounds as if it had not stopped.

    The updates of 16-bit parameters are float32, and `optax.apply_updates` adds them
    without rounding again. So use this outermost: ``optax.scale`` after it, for
    example, would undo that. Only a `paged` transformation goes around it. If ``tx`` is
    paged, the result is too, and rounds inside.

    Args:
        tx: any Optax transformation.
        seed: seed of the random bits.

    Returns:
        A transformation with a `StochasticRoundingState`.

    Example:
        Ten steps of 1e-4 from 1, where the next bfloat16 below is 0.9961:

        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.optim.stochastic_rounding(jaxbnb.adamw8bit(1e-4))
        >>> step = jax.jit(jaxbnb.optim.fused_step(tx), donate_argnums=(1, 2))
        >>> params = jnp.ones((256, 1024), jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(10):
        ...     params, state = step(jnp.ones_like(params), state, params)
        >>> round(float(jnp.mean(params.astype(jnp.float32))), 4)
        0.999
    """
    definition = definition_of(tx)
    if isinstance(definition, Paged):
        inner = stochastic_rounding(definition.tx, seed)
        return paged(inner, definition.device_budget)
    tx = optax.with_extra_args_support(tx)
    return _StochasticRounding(tx, seed).transformation()


@dataclasses.dataclass(frozen=True, eq=False)
class _StochasticRounding(Definition):
    """What `stochastic_rounding` does."""

    tx: optax.GradientTransformationExtraArgs
    seed: int

    def init(self, params: optax.Params) -> StochasticRoundingState:
        return StochasticRoundingState(jnp.zeros((), jnp.int32), self.tx.init(params))

    def update(self, updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("stochastic_rounding needs the parameters: give params")
        updates, new, state = self._step(updates, state, params, extra_args)

        def difference(update, new, old):
            # Exact in float32, as the sum is then, unless one is 2^16 times the other.
            if not _is_16_bit(old):
                return update
            return new.astype(jnp.float32) - old.astype(jnp.float32)

        return jax.tree.map(difference, updates, new, params), state

    def fused_step(self, grads, state, params):
        return self._step(grads, state, params, {})[1:]

    def _step(self, updates, state, params, extra_args):
        """Returns updates, new parameters and the new state."""
        updates, inner = self.tx.update(
            updates, state.inner_state, params, **extra_args
        )
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        new = apply_updates_stochastic(params, updates, key)
        count: Any = optax.safe_increment(state.count)
        return updates, new, StochasticRoundingState(count, inner)


def _is_16_bit(x: Any) -> bool:
    """Says whether a parameter is rounded."""
    return jnp.asarray(x).dtype in _ROUNDED


def _apply(p, u, key):
    """The new value of one leaf."""
    if p is None or u is None:
        return optax.apply_updates(p, u)  # pyright: ignore[reportArgumentType]
    dtype = jnp.asarray(p).dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:
        raise NotImplementedError(
            f"apply_updates_stochastic rounds to bfloat16 and float16; got {dtype}"
        )
    if dtype not in _ROUNDED:
        return optax.apply_updates(p, u)
    x = jnp.asarray(p).astype(jnp.float32) + jnp.asarray(u).astype(jnp.float32)
    noise = _noise(key, x.shape)
    has_neighbours = jnp.abs(x) < float(jnp.finfo(dtype).max)
    return jnp.where(has_neighbours, _ROUNDED[dtype](x, noise), x.astype(dtype))


def _noise(key: Any, shape: tuple[int, ...]) -> UInt32[Array, "*s"]:
    """Draws 32 random bits for each element: a hash of its index and of the key.

    XLA fuses this with the sum, so no noise is written to memory. `jax.random.bits`
    would write 8 bytes an element, four times a bfloat16.
    """
    first, second = jax.random.bits(key, (2,))
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hash(_hash(index ^ first) ^ second)


def _hash(x: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Mixes the bits of integers: lowbias32 of Wellons, Hash Prospector, 2018."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _to_bfloat16(x: Float32[Array, "*s"], noise: UInt32[Array, "*s"]):
    """Rounds finite values by the upper half of 32 random bits.

    A bfloat16 is the upper half of a float32. Noise on the lower half carries with the
    right probability, into the exponent too where the next value is there.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _to_float16(x: Float32[Array, "*s"], noise: UInt32[Array, "*s"]):
    """Rounds values below the largest one by the upper 24 of 32 random bits.

    By exact arithmetic and not on bits, because float16 has subnormals, at a fixed
    spacing, where float32 has none. For them, a probability below 2^-24 is rounded up
    to that.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    spacing = jnp.maximum(power, 2.0**-14) * 2.0**-10
    steps = jnp.abs(x) / spacing
    below = jnp.floor(steps)
    up = (noise >> 8).astype(jnp.float32) * 2.0**-24 < steps - below
    magnitude = jnp.where(up, below + 1, below) * spacing
    return jnp.copysign(magnitude, x).astype(jnp.float16)


_ROUNDED = {
    jnp.dtype(jnp.bfloat16): _to_bfloat16,
    jnp.dtype(jnp.float16): _to_float16,
}
