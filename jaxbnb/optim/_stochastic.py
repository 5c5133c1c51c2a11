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
