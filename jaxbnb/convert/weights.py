"""What every conversion does with a weight: cast it, quantise it, measure the error."""

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

# Elements cast at a time: 16 MiB of float32, however large the tensor.
_CHUNK: Final = 2**22


def quantize_weight(
    weight: np.ndarray, config: QuantConfig
) -> tuple[QuantizedArray, tuple[jax.Array, jax.Array]]:
    """The kernel ``(in, out)`` of a weight ``(out, in)``, quantised.

    Beside it are the powers of the values and of what quantising changed, for `sqnr`.
    """
    x = jnp.asarray(weight)
    # Along the rows as they lie, which are the columns of the kernel.
    q = config.quantize_embedding(x)
    return q.mT, _powers(x, q)


def sqnr(powers: Iterable[tuple[jax.Array, jax.Array]]) -> float:
    """The power of values over that of their error, in decibels."""
    signal, noise = map(sum, zip(*jax.device_get(list(powers)), strict=True))
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


@jax.jit
def _powers(x: jax.Array, q: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """The sum of squares of an array, and of what quantising it changed."""
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
    """As `cast_whole`, but yields the elements in chunks, to save memory."""
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
    lost = np.isfinite(values) & ~np.isfinite(rounded)
    if lost.any():
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has {values[lost][0]:.4g}, beyond "
            f"{dtype.name}'s largest, {float(ml_dtypes.finfo(dtype).max):.4g}; convert "
            "it to another dtype"
        )
    return rounded
