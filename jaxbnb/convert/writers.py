"""How each library stores quantised weights: one line a library."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from jaxbnb.convert import _bitsandbytes_writer, _compressed_tensors_writer
from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.core import QuantConfig, QuantizedArray


@dataclasses.dataclass(frozen=True)
class Writer:
    """Functions that store weights for one library.

    Attributes:
        name: the library's name.
        make_config: ``make_config(config, skip)`` returns the ``quantization_config``.
            It raises ValueError if the library does not have the format.
        plan_arrays: ``plan_arrays(name, info, config)`` returns the arrays of a weight
            ``(out, in)``.
        make_arrays: ``make_arrays(name, q)`` returns their values, from a kernel
            ``(in, out)``.
    """

    name: str
    make_config: Callable[[QuantConfig, Sequence[str]], dict[str, Any]]
    plan_arrays: Callable[[str, TensorInfo, QuantConfig], dict[str, TensorInfo]]
    make_arrays: Callable[[str, QuantizedArray], Mapping[str, np.ndarray]]


BITSANDBYTES: Final = "bitsandbytes"
COMPRESSED_TENSORS_TYPES: Final = _compressed_tensors_writer.QUANT_TYPES
_WRITERS: Final = {
    writer.name: writer
    for writer in (
        Writer(
            BITSANDBYTES,
            QuantConfig.to_huggingface,
            _bitsandbytes_writer.plan_arrays,
            _bitsandbytes_writer.make_arrays,
        ),
        Writer(
            "compressed-tensors",
            _compressed_tensors_writer.make_config,
            _compressed_tensors_writer.plan_arrays,
            _compressed_tensors_writer.make_arrays,
        ),
    )
}


def find_writer(name: str) -> Writer:
    """Returns the writer for a library.

    Raises:
        ValueError: there is none; the message lists all.

    Example:
        >>> find_writer("compressed-tensors").name
        'compressed-tensors'
    """
    if name not in _WRITERS:
        raise ValueError(f"to must be one of {list(_WRITERS)}, got {name!r}")
    return _WRITERS[name]
