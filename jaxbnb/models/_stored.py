"""Checkpoints that are quantised already: which layers, and their weights as stored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jaxbnb.convert import Checkpoint, UnsupportedCheckpointError
from jaxbnb.core import QuantConfig, QuantizedArray


def find_stored_formats(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    names: Mapping[tuple[str, ...], Sequence[str]],
) -> dict[str, QuantConfig]:
    """The format of each linear layer, by its dotted path.

    Args:
        checkpoint: some of its weights are stored quantised.
        quant: what the caller asks for.
        names: of the tensors that are in each variable of a model, by its path.

    Raises:
        ValueError: ``quant`` is not None: it would be a second quantisation.
        UnsupportedCheckpointError: layers of one stack differ, or a weight is quantised
            that is no linear layer's.
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
        one = chosen.pop()
        if chosen:
            problems.append(f"{tensors[0]} and the same of other layers differ")
        elif one is not None and path[-1] != "kernel":
            problems.append(f"{tensors[0]} is not of a linear layer")
        elif one is not None:
            formats[".".join(path[:-1])] = one
    if problems:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised as no model of jaxbnb is:\n  "
            + "\n  ".join(problems)
        )
    return formats


def read_as(checkpoint: Checkpoint, name: str, variable: nnx.Variable) -> Any:
    """A tensor; for a quantised variable, what is stored quantised as it is stored."""
    value: Any = variable.get_value()
    if isinstance(value, QuantizedArray) and name in checkpoint.quantized:
        # The dtype is of what was quantised; the variables of a model have one.
        q = checkpoint.read_quantized(name)
        return dataclasses.replace(q, dtype=np.dtype(value.dtype))
    return checkpoint.read(name)


def cut_columns(q: QuantizedArray, columns: np.ndarray) -> QuantizedArray:
    """Some columns of a kernel ``(in, out)``, blocked along ``in``, its arrays NumPy's.

    Raises:
        UnsupportedCheckpointError: the absmax are quantised in blocks of which the
            columns have parts.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.eye(64, 8), "nf4", axis=-2)
        >>> cut_columns(jax.tree.map(np.asarray, q), np.arange(4)).shape
        (64, 4)
    """
    nested = q.nested_absmax
    if nested is not None:
        per_column = q.absmax.shape[-1]
        used = np.add.outer(columns * per_column, np.arange(per_column)).ravel() // 256
        nested = nested[used[::256]]
        if (used != np.repeat(used[::256], 256)[: len(used)]).any():
            raise UnsupportedCheckpointError(
                f"a doubly quantised matrix of shape {q.shape} holds several layers "
                "whose absmax share blocks of 256; load the checkpoint it was made "
                "from, with quant= to quantise it"
            )
    return dataclasses.replace(
        q, codes=q.codes[columns], absmax=q.absmax[columns], nested_absmax=nested
    )
