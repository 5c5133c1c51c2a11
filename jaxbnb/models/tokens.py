"""Checks token ids in any form that people pass, and casts them to int32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32_MAX = 2**31 - 1


def as_array(x: Any, what: str, padding: str) -> Any:
    """Returns a JAX array as it is, and anything else as a NumPy array.

    Args:
        x: an array, a tensor of another library, or nested lists.
        what: name of it in errors, in the plural, e.g. "batch 3: its tokens".
        padding: advice in errors about rows of different lengths.

    Raises:
        TypeError: NumPy cannot read it, e.g. a bfloat16 tensor of torch.
        ValueError: its rows differ in length.
    """
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{what} are of type {type(x).__name__}, which NumPy cannot read: {error}. "
            "Give an array, or a CPU tensor, of integers or bools"
        ) from error
    except ValueError:
        lengths = sorted({np.size(row) for row in x})
        raise ValueError(
            f"{what} have rows that differ in length, {lengths[0]} to {lengths[-1]}. "
            f"{padding}"
        ) from None


def token_array(x: Any, what: str, padding: str, taken: str) -> Any:
    """Returns a matrix of integers, as a NumPy or JAX array of any integer dtype.

    Args:
        x: see `as_array`, also for the next two.
        what: name of it in errors.
        padding: advice in errors about rows of different lengths.
        taken: description in errors of what is allowed.

    Raises:
        TypeError: it does not hold integers.
        ValueError: it is empty, or not a matrix.
    """
    array = as_array(x, what, padding)
    if array.size == 0:
        raise ValueError(f"{what} are empty, of shape {array.shape}; {taken}")
    if not np.issubdtype(array.dtype, np.integer):
        plain = array.dtype.kind not in "OSU"
        kind = array.dtype if plain else type(array.flat[0]).__name__
        raise TypeError(f"{what} are of type {kind}; {taken}")
    if array.ndim != 2:
        raise ValueError(f"{what} have shape {array.shape}; {taken}")
    return array


def check_vocabulary(tokens: Any, vocab_size: int, what: str) -> None:
    """Raises ValueError for a token outside the vocabulary, padding or not.

    Args:
        tokens: a matrix of integers, fetched if it is on a device.
        vocab_size: size of the model's vocabulary.
        what: start of the message, e.g. "batch 3".
    """
    tokens = np.asarray(tokens)
    outside = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        row, position = outside[0]
        more = f", and {len(outside) - 1} more are" if len(outside) > 1 else ""
        raise ValueError(
            f"{what}: token {tokens[row, position]} of row {row}, position {position}, "
            f"is outside the model's vocabulary, 0 to {vocab_size - 1}{more}. Padding "
            "needs a token in the vocabulary too; the mask leaves it out"
        )


def as_int32(tokens: Any) -> Any:
    """Returns integers as int32, on the device if they are there.

    A number that int32 cannot hold becomes an id outside every vocabulary. Wrapping
    around could turn it into a valid id.
    """
    dtype = np.dtype(tokens.dtype)
    if dtype == np.int32:
        return tokens
    if not np.can_cast(dtype, np.int32):
        xp = jnp if isinstance(tokens, jax.Array) else np
        tokens = xp.clip(tokens, -1 if dtype.kind == "i" else 0, _INT32_MAX)
    return tokens.astype(np.int32)
