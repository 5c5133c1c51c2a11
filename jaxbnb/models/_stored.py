"""Checkpoints that are already quantised: their formats, and weights as stored."""

import dataclasses
import os
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from flax import nnx

from jaxbnb.convert import Checkpoint, UnsupportedCheckpointError
from jaxbnb.core import QuantConfig, QuantizedArray

# What a caller gives as ``quant`` for weights as a file stores them.
STORED: Final = "stored"


def keep_stored(
    checkpoint: Checkpoint, names: Mapping[tuple[str, ...], Sequence[str]]
) -> Checkpoint:
    """Returns a checkpoint with linear layers as stored that it would decode.

    The layers of a stack share a format. If a file stores them in several, they are
    decoded.

    Args:
        checkpoint: the checkpoint.
        names: names of weights; see `find_stored_formats`.

    Raises:
        ValueError: no weight is stored quantised.
    """
    if not checkpoint.encodings:
        raise ValueError(explain_unquantized(checkpoint.path))
    kept = dict(checkpoint.quantized)
    for path, tensors in names.items():
        formats = {checkpoint.packable.get(name) for name in tensors}
        (format, *others) = formats
        if path[-1] == "kernel" and format is not None and not others:
            kept |= dict.fromkeys(tensors, format)
    return dataclasses.replace(checkpoint, quantized=types.MappingProxyType(kept))


def explain_unquantized(path: str | os.PathLike[str]) -> str:
    """Says that the weights of a checkpoint have no format that could be kept."""
    return (
        f"{path} stores no weight quantised, so quant={STORED!r} does not say a "
        "format; give one, such as 'nf4', or leave out quant"
    )


def find_stored_formats(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    names: Mapping[tuple[str, ...], Sequence[str]],
) -> dict[str, QuantConfig]:
    """Returns the format of each linear layer, by its dotted path.

    Args:
        checkpoint: checkpoint that stores some weights quantised.
        quant: format that the caller asks for.
        names: names of the tensors in each variable of a model, by the variable's path.

    Raises:
        ValueError: ``quant`` is not None. It would quantise a second time.
        UnsupportedCheckpointError: layers of a stack differ, or a quantised weight does
            not belong to a linear layer.
    """
    if quant is not None:
        raise ValueError(
            f"{checkpoint.path} is quantised already, and is loaded as it is stored; "
            f"leave out quant, got {quant.quant_type!r}"
        )
    formats: dict[str, QuantConfig] = {}
    problems = []
    for path, tensors in names.items():
        chosen = {checkpoint.quantized.get(name) for name in tensors}
        format = chosen.pop()
        if chosen:
            problems.append(f"{tensors[0]} and the same of other layers differ")
        elif format is not None and path[-1] != "kernel":
            problems.append(f"{tensors[0]} does not belong to a linear layer")
        elif format is not None:
            formats[".".join(path[:-1])] = format
    if problems:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised in a way that jaxbnb cannot load:\n  "
            + "\n  ".join(problems)
        )
    return formats


def find_decoded(
    checkpoint: Checkpoint,
    names: Mapping[tuple[str, ...], Sequence[str]],
    *,
    is_asked: bool,
) -> dict[str, str]:
    """Returns weights that a caller may expect as stored, and their encodings.

    Args:
        checkpoint: the checkpoint.
        names: names of weights; see `find_stored_formats`.
        is_asked: whether the caller asked for weights as stored. If not, those of a
            GGUF file are expected to be decoded.
    """
    if checkpoint.stored is not None:
        return checkpoint.decoded
    if not is_asked:
        return {}
    kernels = {
        n for path, found in names.items() if path[-1] == "kernel" for n in found
    }
    return {n: kind for n, kind in checkpoint.decoded.items() if n in kernels}


def warn_of_decoded(checkpoint: Checkpoint, decoded: Mapping[str, str]) -> None:
    """Warns of weights from `find_decoded`, which take more memory in the model."""
    if not decoded:
        return
    name, encoding = next(iter(decoded.items()))
    warnings.warn(
        f"{checkpoint.path}: {len(decoded)} quantised weights are decoded, because no "
        "format of jaxbnb holds them exactly, or other layers of the model have "
        f"another format; the first is {name}, {encoding}. With quant= and a format, "
        "they are quantised again",
        stacklevel=3,
    )


def read_as(
    checkpoint: Checkpoint,
    name: str,
    variable: nnx.Variable,
    *,
    is_mapped: bool = False,
) -> Any:
    """Reads a tensor for a variable. If both are quantised, it is not decoded.

    Args:
        checkpoint: checkpoint with the tensor.
        name: name of the tensor.
        variable: variable of the model.
        is_mapped: leave a tensor in its file until its parts are used.
    """
    value: Any = variable.get_value()
    if isinstance(value, QuantizedArray) and name in checkpoint.quantized:
        # The dtype before quantisation. All variables of a model share one.
        q = checkpoint.read_quantized(name)
        return dataclasses.replace(q, dtype=np.dtype(value.dtype))
    return checkpoint.map(name) if is_mapped else checkpoint.read(name)


def cut_columns(q: QuantizedArray, columns: np.ndarray) -> QuantizedArray:
    """Takes columns of kernels ``(*batch, in, out)``, blocked along ``in``, in NumPy.

    Raises:
        UnsupportedCheckpointError: the absmax are quantised in blocks, and the columns
            have only parts of some.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.eye(64, 8), "nf4", axis=-2)
        >>> cut_columns(jax.tree.map(np.asarray, q), np.arange(4)).shape
        (64, 4)
    """
    nested = q.nested_absmax
    if nested is not None and q.double_quant:
        per_column = q.absmax.shape[-1]
        used = np.add.outer(columns * per_column, np.arange(per_column)).ravel() // 256
        nested = nested[used[::256]]
        if (used != np.repeat(used[::256], 256)[: len(used)]).any():
            raise UnsupportedCheckpointError(
                f"a doubly quantised matrix of shape {q.shape} holds several layers "
                "that share blocks of 256 absmax; load the original checkpoint, with "
                "quant= to quantise it"
            )
    return dataclasses.replace(
        q,
        codes=q.codes[..., columns, :],
        absmax=q.absmax[..., columns, :],
        nested_absmax=nested,
        zero_point=None if q.zero_point is None else q.zero_point[..., columns, :],
    )
