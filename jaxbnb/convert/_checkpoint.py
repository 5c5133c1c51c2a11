"""Checkpoint: what a checkpoint holds, and one tensor of it at a time."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxbnb.convert._errors import CheckpointError, MissingTensorError
from jaxbnb.core import QuantConfig, QuantizedArray


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a tensor, as `Checkpoint.read` returns it.

    Example:
        >>> TensorInfo((49152, 576), np.dtype("float32")).nbytes
        113246208
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `Checkpoint.read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A model's weights and configuration in Hugging Face's terms, whatever the file.

    Invariants: names are Hugging Face's (``model.layers.3.self_attn.q_proj.weight``),
    arrays are in torch's conventions, a linear weight being ``(out, in)`` and the rows
    of queries and keys in the order of rotated halves; ``read(name)`` has exactly the
    shape and the dtype of ``tensors[name]``. No file stays open between reads. A weight
    that bitsandbytes quantised is one tensor, whose shape and dtype are those of what
    was quantised: `read` decodes it, and `read_quantized` gives it as it is stored.

    Attributes:
        path: the folder or the file.
        config: the fields of Hugging Face's ``config.json``.
        tensors: shape and dtype of each tensor, in the order of the file.
        reader: reads one tensor; call `read`, which checks what it returns.
        quantized: the format of each weight that is stored quantised.
        quantized_reader: reads one of these; call `read_quantized`.
        stored: where weights are quantised, the same checkpoint tensor by tensor, with
            codes and scales under their own names; else None.
        encodings: of each tensor that `read` decodes from a GGUF file, ggml's name of
            how it is stored, such as "Q4_K", and its bytes in the file.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    reader: Callable[[str], np.ndarray]
    quantized: Mapping[str, QuantConfig] = dataclasses.field(default_factory=dict)
    quantized_reader: Callable[[str], QuantizedArray] | None = None
    stored: "Checkpoint | None" = None
    encodings: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors together, as they are stored or `read` returns."""
        if self.stored is not None:
            return self.stored.nbytes
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """Reads one tensor.

        Args:
            name: a key of ``tensors``.

        Returns:
            An array of ``tensors[name].shape`` and ``.dtype``; it may be read-only.

        Raises:
            MissingTensorError: there is no tensor of that name; the message has the
                nearest names.
            CheckpointError: the file changed since the checkpoint was opened.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"; the nearest are {near}" if near else ""
            raise MissingTensorError(
                f"{self.path} has no tensor {name!r} among its {len(self.tensors)}"
                f"{hint}"
            )
        array, info = self.reader(name), self.tensors[name]
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
            name: a key of ``quantized``.

        Returns:
            The kernel, ``(in, out)`` in blocks along ``in``, its arrays NumPy's.

        Raises:
            MissingTensorError: no weight of that name is stored quantised.
            UnsupportedCheckpointError: its blocks run across the ends of rows.
            CheckpointError: what is stored is not what its state says.
        """
        if name not in self.quantized or self.quantized_reader is None:
            raise MissingTensorError(
                f"{self.path}: no tensor {name!r} is stored quantised; "
                f"{len(self.quantized)} are"
            )
        return self.quantized_reader(name)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {self.config.get('model_type')!r}, "
            f"{len(self.tensors)} tensors, {self.nbytes / 1e6:,.1f} MB)"
        )
