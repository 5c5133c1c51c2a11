"""Checkpoint: the tensors and the config of a model, read one tensor at a time."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxbnb.convert._errors import CheckpointError, MissingTensorError
from jaxbnb.convert.file_reader import FileReader
from jaxbnb.core import QuantConfig, QuantizedArray


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a tensor that `Checkpoint.read` returns.

    Example:
        >>> TensorInfo((49152, 576), np.dtype("float32")).nbytes
        113246208
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the array that `Checkpoint.read` returns, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A model's weights and configuration in Hugging Face's terms, whatever the file.

    Invariants: names are Hugging Face's (``model.layers.3.self_attn.q_proj.weight``).
    Arrays follow torch's conventions: a linear weight is ``(out, in)``, and the rows of
    queries and keys are ordered as rotated halves. ``read(name)`` has exactly the shape
    and dtype of ``tensors[name]``. No file stays open between reads. A weight that
    was quantised is one tensor with its original shape and dtype: `read` decodes it,
    and `read_quantized` returns it as it is stored, if a format holds it exactly.

    Attributes:
        path: path of the folder or file.
        config: fields of Hugging Face's ``config.json``.
        tensors: shape and dtype of each tensor, in the order of the file.
        reader: function that reads one tensor; call `read`, which checks its result.
        quantized: format of each weight that is stored quantised, and that a format
            holds exactly.
        quantized_reader: function that reads one of these, or of ``packable``; call
            `read_quantized`.
        stored: the same checkpoint with the codes and scales of quantised weights as
            separate tensors; None if no weight is quantised.
        encodings: name of the format, such as ggml's "Q4_K", and the size in bytes, of
            each tensor that is stored quantised.
        packable: format of each weight of a GGUF file that a format holds exactly. It
            is decoded, unless it is asked for as it is stored.
        metadata: metadata of the files that describe weights as they are stored.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    reader: Callable[[str], np.ndarray]
    quantized: Mapping[str, QuantConfig] = dataclasses.field(default_factory=dict)
    quantized_reader: Callable[[str], QuantizedArray] | None = None
    stored: "Checkpoint | None" = None
    encodings: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    packable: Mapping[str, QuantConfig] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def decoded(self) -> dict[str, str]:
        """The format's name of each quantised weight that can only be read decoded."""
        return {
            name: kind
            for name, (kind, _) in self.encodings.items()
            if name not in self.quantized
        }

    @property
    def nbytes(self) -> int:
        """Size of all tensors together in bytes, with quantised weights as stored."""
        if self.stored is not None:
            return self.stored.nbytes
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """Reads one tensor.

        Args:
            name: a key of ``tensors``.

        Returns:
            An array with the shape and dtype of ``tensors[name]``. It may be read-only.

        Raises:
            MissingTensorError: there is no tensor with that name; the message lists
                similar names.
            CheckpointError: the file has changed since the checkpoint was opened.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"; similar names are {near}" if near else ""
            raise MissingTensorError(
                f"{self.path} has no tensor {name!r} among its {len(self.tensors)}"
                f"{hint}"
            )
        return self._check(name, self.reader(name))

    def map(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """Returns one tensor like `read`, but reads its parts only when they are used.

        A tensor that must be decoded, or does not lie in a safetensors file, is read.

        Args:
            name: a key of ``tensors``.
        """
        if not isinstance(self.reader, FileReader) or name not in self.tensors:
            return self.read(name)
        return self._check(name, self.reader.map(name))

    def _check(self, name: str, array: np.ndarray) -> np.ndarray:
        info = self.tensors[name]
        if array.shape != info.shape or array.dtype != info.dtype:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} was {info.dtype}{list(info.shape)} when "
                f"the checkpoint was opened, and is {array.dtype}{list(array.shape)} "
                "now; open it again"
            )
        return array

    def read_quantized(self, name: str) -> QuantizedArray:
        """Reads one quantised weight byte for byte, as the kernel of a dense layer.

        Args:
            name: a key of ``quantized`` or ``packable``.

        Returns:
            The kernel ``(in, out)``, quantised in blocks along ``in``; its arrays are
            NumPy's.

        Raises:
            MissingTensorError: no quantised weight has that name.
            UnsupportedCheckpointError: its blocks run across the ends of rows.
            CheckpointError: the stored arrays contradict the weight's state.
        """
        held = {**self.packable, **self.quantized}
        if name not in held or self.quantized_reader is None:
            raise MissingTensorError(
                f"{self.path}: tensor {name!r} is not stored in a format of jaxbnb; "
                f"tensors that are: {len(held)}"
            )
        return self.quantized_reader(name)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {self.config.get('model_type')!r}, "
            f"{len(self.tensors)} tensors, {self.nbytes / 1e6:,.1f} MB)"
        )
