"""Checkpoints that are quantised already: which layers, and their weights as stored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbnb.convert import Checkpoint, UnsupportedCheckpointError
from jaxbnb.core import QuantConfig, QuantizedArray


def stored_formats(
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
            f"leave out quant, got {quant}"
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


def read_as(checkpoint: Checkpoint, name: str, value: Any) -> Any:
    """A tensor; for a quantised variable, what is stored quantised as it is stored."""
    if isinstance(value, QuantizedArray) and name in checkpoint.quantized:
        # The dtype is of what was quantised; the variables of a model have one.
        q = checkpoint.read_quantized(name)
        return dataclasses.replace(q, dtype=np.dtype(value.dtype))
    return checkpoint.read(name)
