"""Rotary position embeddings, in Hugging Face's layout of two halves, and scaling."""

import dataclasses
import math
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

ROPE_KINDS: Final = ("dynamic", "linear", "llama3", "longrope", "yarn")
# In these kinds, frequencies depend on the number of positions.
_BY_LENGTH: Final = ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rope are changed so that a model takes more positions.

    Attributes:
        kind: "dynamic", "linear", "llama3", "longrope" or "yarn".
        factor: divisor of low frequencies; for "dynamic", the length that the model
            takes in units of the original one; unused for "longrope".
        original_max_position_embeddings: number of positions before scaling; unused for
            "linear".
        low_freq_factor: bound of "llama3": wavelengths above
            ``original_max_position_embeddings / low_freq_factor`` are scaled.
        high_freq_factor: bound of "llama3": wavelengths below
            ``original_max_position_embeddings / high_freq_factor`` are not scaled.
        beta_fast: bound of "yarn": frequencies with at least this many turns in the
            original length are not scaled.
        beta_slow: bound of "yarn": frequencies with at most this many turns are scaled.
        truncate: whether "yarn" rounds its two bounds to whole dimensions.
        short_factor: divisors of the frequencies, for "longrope".
        long_factor: the same, for texts longer than
            ``original_max_position_embeddings``.
        attention_factor: factor of cosine and sine.

    Raises:
        ValueError: ``kind`` is unknown, a number is not positive, or the bounds of
            "llama3" are not in order.

    References:
        Chen et al., Extending Context Window via Position Interpolation, 2023 (linear).
        Peng et al., YaRN: Efficient Context Window Extension, 2023 (also dynamic).
        Ding et al., LongRoPE: Extending LLM Context Window Beyond 2M Tokens, 2024.
    """

    kind: str
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"kind must be one of {ROPE_KINDS}, got {self.kind!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float or field.type is int:
                check_positive(f"{field.name} of rope of type {self.kind!r}", value)
            elif field.type == tuple[float, ...]:
                for factor in value:
                    check_positive(f"each {field.name} of rope", factor)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor of rope must be less than high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


def is_positive(value: Any) -> bool:
    """Whether a value is a positive number that is normal and finite in float32."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 2.0**-126 <= value < 2.0**128


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless ``value``, called ``name``, `is_positive`."""
    if not is_positive(value):
        raise ValueError(f"{name} must be a positive number, got {value!r:.100}")


def depends_on_length(scaling: RopeScaling | None) -> bool:
    """Whether frequencies change with the length of a text."""
    return scaling is not None and scaling.kind in _BY_LENGTH


def find_turning_length(scaling: RopeScaling | None) -> int | None:
    """Returns the last length with the short factors of "longrope"; None for others."""
    if scaling is None or scaling.kind != "longrope":
        return None
    return scaling.original_max_position_embeddings


def rope_frequencies(
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length: int | Int[Array, ""] = 1,
) -> Float[np.ndarray, " half"] | Float32[Array, " half"]:
    """Returns radians per position, ``theta ** (-2 i / rotary_dim)``, scaled.

    Args:
        rotary_dim: number of features that are rotated; even.
        theta: base of the frequencies.
        scaling: scaling of the frequencies; None for no scaling.
        length: number of positions in the longest row so far; may be traced. "longrope"
            chooses its factors by it, "dynamic" its base.

    Returns:
        The frequencies; a NumPy array if ``length`` is an int or does not matter.

    Example:
        >>> rope_frequencies(4, 100.0, RopeScaling("linear", factor=2.0)).tolist()
        [0.5, 0.05]
    """
    frequencies = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        is_long = length > scaling.original_max_position_embeddings
        short, long = (
            frequencies / np.asarray(factors)
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        if isinstance(is_long, bool):
            return long if is_long else short
        return jnp.where(is_long, *(jnp.asarray(x, jnp.float32) for x in (long, short)))
    if scaling.kind == "dynamic":
        return _scale_dynamic(frequencies, rotary_dim, scaling, length)
    if scaling.kind == "llama3":
        kept = _compute_llama3_share(frequencies, scaling)
    else:
        kept = _compute_yarn_share(rotary_dim, theta, scaling)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _scale_dynamic(
    frequencies: np.ndarray,
    rotary_dim: int,
    scaling: RopeScaling,
    length: int | Int[Array, ""],
) -> Float[np.ndarray, " half"] | Float32[Array, " half"]:
    """Scales NTK-aware: the base grows by ``stretch ** (dim / (dim - 2))``."""
    xp: Any = np if isinstance(length, int) else jnp
    share = length / scaling.original_max_position_embeddings
    stretch = xp.maximum(scaling.factor * share - (scaling.factor - 1), 1.0)
    # The powers of theta were computed before, in float64. (With 2 features, the only
    # frequency is 1 for any base.)
    powers = np.arange(0, rotary_dim, 2) / max(rotary_dim - 2, 1)
    if xp is np:
        return frequencies * stretch**-powers
    frequencies, powers = (jnp.asarray(x, jnp.float32) for x in (frequencies, powers))
    return frequencies * stretch**-powers


def _compute_llama3_share(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns the unscaled share of each frequency: 1 for high ones, 0 for low ones."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _compute_yarn_share(
    rotary_dim: int, theta: float, scaling: RopeScaling
) -> np.ndarray:
    """Returns the unscaled share of each frequency, falling linearly with its index."""

    def dimension(turns: float) -> float:
        """Returns the index of the frequency with ``turns`` in the original length."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # If the bounds coincide, the ramp becomes a step.
    width = high - low or 0.001
    return 1 - np.clip((np.arange(rotary_dim // 2) - low) / width, 0.0, 1.0)


def rope_angles(
    positions: Int[Array, "batch seq"],
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length: int | Int[Array, ""] = 1,
) -> tuple[Float32[Array, "batch seq 1 half"], Float32[Array, "batch seq 1 half"]]:
    """Computes cosine and sine of position times frequency, with an axis for the heads.

    Args:
        positions: positions of the tokens.
        rotary_dim: see `rope_frequencies`, also for the others.
        theta: base of the frequencies.
        scaling: scaling of the frequencies; None for no scaling.
        length: number of positions in the longest row so far.

    Example:
        >>> import jax.numpy as jnp
        >>> cos, sin = rope_angles(jnp.zeros((1, 3), jnp.int32), 64, 10_000.0)
        >>> cos.shape, float(cos.min()), float(sin.max())
        ((1, 3, 1, 32), 1.0, 0.0)
    """
    frequencies = rope_frequencies(rotary_dim, theta, scaling, length)
    frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float32[Array, "#batch seq 1 half"],
    sin: Float32[Array, "#batch seq 1 half"],
    is_interleaved: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs ``(x[i], x[i + half])``, in float32.

    Args:
        x: queries or keys; features of a head beyond ``2 half`` do not change.
        cos: cosine of the angles, from `rope_angles`.
        sin: sine of the angles.
        is_interleaved: whether the pairs are neighbours, ``(x[2 i], x[2 i + 1])``.

    Returns:
        The rotated array, in the dtype of ``x``.
    """
    half = cos.shape[-1]
    pairs, rest = jnp.split(x.astype(jnp.float32), [2 * half], axis=-1)
    if is_interleaved:
        first, second = pairs[..., ::2], pairs[..., 1::2]
    else:
        first, second = jnp.split(pairs, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if is_interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(pairs.shape)]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x.dtype)
