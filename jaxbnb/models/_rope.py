"""Rotary position embeddings, in halves as Hugging Face lays them out."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def rope_angles(
    positions: Int[Array, "batch seq"], head_dim: int, theta: float
) -> tuple[Float32[Array, "batch seq 1 half"], Float32[Array, "batch seq 1 half"]]:
    """Cosine and sine of ``position * theta ** (-2 i / head_dim)``, an axis for heads.

    Example:
        >>> import jax.numpy as jnp
        >>> cos, sin = rope_angles(jnp.zeros((1, 3), jnp.int32), 64, 10_000.0)
        >>> cos.shape, float(cos.min()), float(sin.max())
        ((1, 3, 1, 32), 1.0, 0.0)
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    frequencies = jnp.asarray(theta**-exponents, jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float32[Array, "#batch seq 1 half"],
    sin: Float32[Array, "#batch seq 1 half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs ``(x[i], x[i + head_dim / 2])``, in float32.

    Args:
        x: queries or keys.
        cos: of the angles, as `rope_angles` gives them.
        sin: of the angles.

    Returns:
        As ``x``, in its dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
