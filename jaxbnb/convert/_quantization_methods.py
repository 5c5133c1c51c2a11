"""Finds the reader of a quantised checkpoint by its ``quantization_config``."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from jaxbnb.convert import (
    _compressed_tensors_reader,
    _fp8_reader,
    _gptq_reader,
    _mxfp4_reader,
    _torchao_reader,
)
from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._stored_weights import StoredWeight, present

Reader = Callable[
    [Checkpoint, Mapping[str, Any], Mapping[str, np.ndarray]],
    tuple[dict[str, StoredWeight], list[str]],
]
_TORCHAO: Final = "torchao"
_READERS: Final[dict[str, Reader]] = {
    "gptq": _gptq_reader.find_gptq,
    "awq": _gptq_reader.find_awq,
    "compressed-tensors": _compressed_tensors_reader.find_weights,
    "fp8": _fp8_reader.find_weights,
    "mxfp4": _mxfp4_reader.find_weights,
    _TORCHAO: _torchao_reader.find_weights,
}
_BITSANDBYTES: Final = "bitsandbytes"
# Other methods of transformers, and the package that loads each one.
_OTHERS: Final = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "bitnet": "no other package",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fp_quant": "fp_quant",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "modelopt": "nvidia-modelopt",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "spqr_quant",
    "vptq": "vptq",
}
_ADVICE: Final = (
    "To use it here, decode it to bfloat16 with the library that wrote it, or load the "
    "original checkpoint with quant="
)


def find_shapes(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of small tensors that must be read to know a weight's form."""
    method, _ = _find_method(checkpoint)
    if method == "compressed-tensors":
        return _compressed_tensors_reader.find_shapes(checkpoint.tensors)
    if method == _TORCHAO:
        return _torchao_reader.find_zero_points(checkpoint.tensors)
    return []


def needs_metadata(checkpoint: Checkpoint) -> bool:
    """Returns whether the metadata of a checkpoint's files describe its weights."""
    return _find_method(checkpoint)[0] == _TORCHAO


def merge_weights(
    checkpoint: Checkpoint, shapes: Mapping[str, np.ndarray]
) -> Checkpoint:
    """Presents each weight that another library than bitsandbytes quantised as one.

    Args:
        checkpoint: tensors as they are stored.
        shapes: arrays of the tensors that `find_shapes` names.

    Returns:
        The new checkpoint, or the same one if no weight is quantised.

    Raises:
        CheckpointError: arrays of a weight are missing, or contradict each other or the
            config.
        UnsupportedCheckpointError: jaxbnb does not read this method, or a variant.
    """
    method, fields = _find_method(checkpoint)
    if method in (None, _BITSANDBYTES):
        return checkpoint
    if method not in _READERS:
        known = [_BITSANDBYTES, *_READERS]
        package = _OTHERS.get(method)
        who = f"transformers loads it with {package}. " if package else ""
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised by the method {method[:40]!r}; jaxbnb "
            f"reads {known}. {who}{_ADVICE}"
        )
    weights, ignored = _READERS[method](checkpoint, fields, shapes)
    clash = [
        name
        for name, weight in weights.items()
        if name in checkpoint.tensors and name not in weight.parts
    ]
    if clash:
        raise CheckpointError(
            f"{checkpoint.path} has {clash[0]!r} both quantised and not; remove one"
        )
    if not weights:
        return checkpoint
    return present(checkpoint, weights, ignored)


def _find_method(checkpoint: Checkpoint) -> tuple[str | None, Mapping[str, Any]]:
    """Returns the method that a config names, and its fields."""
    fields = checkpoint.config.get("quantization_config")
    if fields is None:
        # Older checkpoints of compressed-tensors.
        fields = checkpoint.config.get("compression_config")
    if not isinstance(fields, Mapping) or fields.get("quant_method") is None:
        return None, {}
    return str(fields["quant_method"]), fields
