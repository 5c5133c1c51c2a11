"""Adding updates to 16-bit parameters with stochastic rounding."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Key, UInt32


def apply_updates_stochastic(
    params: optax.Params,
    updates: optax.Updates,
    key: Key[Array, ""] | UInt32[Array, "2"],
) -> optax.Params:
    r"""Adds updates to parameters, rounding 16-bit ones up or down at random.

    An update below half the spacing of a parameter's dtype, 2^-9 of a bfloat16, is lost
    when the sum is rounded to nearest. Here the sum is float32, and between its two
    neighbours in the dtype, :math:`a \le x < b`,

    .. math:: P(x \to b) = \frac{x - a}{b - a},

    so that the mean of the result is :math:`x`, and small updates add up. What float32
    itself loses, 2^-25 of the parameter, is lost as before.

    This is for ``bfloat16`` and ``float16``. All else, float32 above all, is added
    exactly as `optax.apply_updates` does, and None is treated as there.

    From the largest finite value on, where no neighbour is left, the sum is rounded to
    nearest, which gives that value or an infinity. NaN and infinity stay what they are.
    A device that takes float32 subnormals for zero (below 1.2e-38; a CPU under XLA
    does) does so with the sum.

    Args:
        params: a pytree of arrays.
        updates: the same tree, of any floating dtype.
        key: a new one each step. Each leaf draws from its own, derived by its place.

    Returns:
        The new parameters, in the dtypes of ``params``.

    Raises:
        NotImplementedError: a parameter has a float dtype of 8 bits or fewer.

    Example:
        The next bfloat16 after 1 is 1.0078, and an eighth of them goes there:

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


def _apply(p, u, key):
    """The new value of one leaf."""
    if p is None or u is None:
        return optax.apply_updates(p, u)  # pyright: ignore[reportArgumentType]
    dtype = jnp.asarray(p).dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:
        raise NotImplementedError(
            f"apply_updates_stochastic rounds to bfloat16 and float16; got {dtype}"
        )
    rounded = {
        jnp.dtype(jnp.bfloat16): _to_bfloat16,
        jnp.dtype(jnp.float16): _to_float16,
    }
    if dtype not in rounded:
        return optax.apply_updates(p, u)
    x = jnp.asarray(p).astype(jnp.float32) + jnp.asarray(u).astype(jnp.float32)
    noise = jax.random.bits(key, x.shape, jnp.uint32)
    has_neighbours = jnp.abs(x) < float(jnp.finfo(dtype).max)
    return jnp.where(has_neighbours, rounded[dtype](x, noise), x.astype(dtype))


def _to_bfloat16(x: Float32[Array, "*s"], noise: UInt32[Array, "*s"]):
    """Rounds by the upper half of 32 random bits: finite values only.

    A bfloat16 is the upper half of a float32. Noise on the lower half carries with the
    probability that is wanted, into the exponent too where that is the next value.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _to_float16(x: Float32[Array, "*s"], noise: UInt32[Array, "*s"]):
    """Rounds by the upper 24 of 32 random bits: below the largest value only.

    By arithmetic, all of it exact: float16 is subnormal, of a fixed spacing, where
    float32 is not. A chance finer than 2^-24, of a subnormal, is rounded up to it.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    spacing = jnp.maximum(power, 2.0**-14) * 2.0**-10
    steps = jnp.abs(x) / spacing
    below = jnp.floor(steps)
    up = (noise >> 8).astype(jnp.float32) * 2.0**-24 < steps - below
    magnitude = jnp.where(up, below + 1, below) * spacing
    return jnp.copysign(magnitude, x).astype(jnp.float16)
