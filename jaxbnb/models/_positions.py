"""Positions without rope: waves that are added, and slopes of the scores (ALiBi)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def make_waves(
    positions: Int[Array, "batch seq"], features: int
) -> Float32[Array, "batch seq features"]:
    """Computes sines and then cosines of the positions, in tensor2tensor's order.

    Args:
        positions: positions of the tokens.
        features: number of waves; even. Wavelengths grow from 2 pi to 20,000 pi.

    Example:
        >>> import jax.numpy as jnp
        >>> make_waves(jnp.array([[0]]), 4).tolist()
        [[[0.0, 0.0, 1.0, 1.0]]]

    References:
        Vaswani et al., Attention Is All You Need, 2017. There, sines and cosines
        alternate.
    """
    half = features // 2
    frequencies = 10_000.0 ** -(np.arange(half) / max(half - 1, 1))
    angles = positions.astype(jnp.float32)[..., None] * jnp.float32(frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def find_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Returns the slope of each head: powers of ``2 ** (-8 / heads)``.

    If the number of heads is not a power of 2, those beyond the largest one below get
    every other slope of twice as many.

    Example:
        >>> find_slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** int(math.log2(heads))
    extra = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.append(2.0 ** (-8 / power * np.arange(1, power + 1)), extra)


def slope_positions(
    positions: Int[Array, "batch keys"], heads: int, *, is_rounded: bool = False
) -> Float32[Array, "batch heads keys"]:
    """Multiplies positions by the slope of each head.

    Scores with this bias differ by the slope times the distance of two keys, so a
    query needs no position of its own.

    Args:
        positions: positions of the keys.
        heads: number of query heads.
        is_rounded: whether the factors and products are rounded to bfloat16.

    Example:
        >>> import jax.numpy as jnp
        >>> slope_positions(jnp.array([[0, 1, 2]]), 1).tolist()
        [[[0.0, 0.00390625, 0.0078125]]]

    References:
        Press et al., Train Short, Test Long: Attention with Linear Biases Enables Input
        Length Extrapolation, 2022.
    """

    def round_(x: Array) -> Array:
        # XLA may leave out a cast to bfloat16 and back.
        return jax.lax.reduce_precision(x, 8, 7) if is_rounded else x

    slopes = round_(jnp.asarray(find_slopes(heads), jnp.float32))
    distances = round_(positions.astype(jnp.float32))
    return round_(slopes[:, None] * distances[:, None])
