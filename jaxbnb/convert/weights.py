"""Steps of every conversion: casts a weight, quantises it, measures the error."""

import math
from collections.abc import Iterable, Iterator
from typing import Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.core import QuantConfig, QuantizedArray

# Elements cast at a time: 16 MiB of float32, whatever the size of the tensor.
_CHUNK: Final = 2**22


def quantize_weight(
    weight: np.ndarray, config: QuantConfig
) -> tuple[QuantizedArray, tuple[jax.Array, jax.Array]]:
    """Quantises a weight ``(out, in)`` to a kernel ``(in, out)``.

    Returns:
        The kernel, and the powers of the values and of their errors, for `sqnr`.
    """
    x = jnp.asarray(weight)
    # Blocks along the rows of the weight are blocks along the columns of the kernel.
    q = config.quantize_embedding(x)
    return q.mT, compute_powers(x, q)


def sqnr(powers: Iterable[tuple[jax.Array, jax.Array]]) -> float:
    """Returns the power of values divided by the power of their errors, in decibels.

    Args:
        powers: the two powers of each weight, from `quantize_weight`.
    """
    signal, noise = map(sum, zip(*jax.device_get(list(powers)), strict=True))
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


@jax.jit
def compute_powers(x: jax.Array, q: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of squares of an array and of its quantisation error."""
    x = x.astype(jnp.float32)
    return jnp.sum(x**2), jnp.sum((x - q.dequantize(jnp.float32)) ** 2)


def cast_whole(
    source: Checkpoint, name: str, values: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Rounds a tensor to ``dtype``; a finite value never becomes infinite."""
    if values.dtype == dtype:
        return values
    whole, first = np.empty(values.size, dtype), 0
    for chunk in cast_chunks(source, name, values, dtype):
        whole[first : first + chunk.size] = chunk
        first += chunk.size
    return whole.reshape(values.shape)


def cast_chunks(
    source: Checkpoint, name: str, values: np.ndarray, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields the elements in chunks, to save memory; otherwise like `cast_whole`."""
    flat = values.reshape(-1)
    for first in range(0, flat.size, _CHUNK):
        yield _cast(source, name, flat[first : first + _CHUNK], dtype)


def _cast(
    source: Checkpoint, name: str, values: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Rounds to ``dtype``; a finite value never becomes infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(dtype)
    is_lost = np.isfinite(values) & ~np.isfinite(rounded)
    if is_lost.any():
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has {values[is_lost][0]:.4g}, beyond "
            f"{dtype.name}'s largest, {float(ml_dtypes.finfo(dtype).max):.4g}; convert "
            "it to another dtype"
        )
    return rounded
