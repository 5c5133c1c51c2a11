"""The metadata of a GGUF file, checked as it is asked for."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._gguf import Gguf, read_rows

_REQUIRED: Final = object()


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a file says of its architecture.

    Keys are written without the architecture that they begin with. Whatever the file
    lacks, or has of another type or sign, is a `CheckpointError`.

    Attributes:
        gguf: the file.
        architecture: its ``general.architecture``.
    """

    gguf: Gguf
    architecture: str

    def size(self, key: str, default: Any = None) -> int:
        """A positive int."""
        key = f"{self.architecture}.{key}"
        value = field(self.gguf, key, int, _REQUIRED if default is None else default)
        return self._checked(key, value, lambda n: 0 < n <= 2**40)

    def count(self, key: str) -> int:
        """An int from 0; 0 where there is none."""
        key = f"{self.architecture}.{key}"
        value = field(self.gguf, key, int, 0)
        return self._checked(key, value, lambda n: 0 <= n <= 2**40)

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive float, as the decimal that its float32 was meant to be (1e-05)."""
        key = f"{self.architecture}.{key}"
        value = _decimal(field(self.gguf, key, float, default))
        return self._checked(key, value, lambda x: 0 < x < math.inf)

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self.gguf.metadata

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of a type, e.g. str."""
        return field(self.gguf, f"{self.architecture}.{key}", kind, default)

    def refuse(self, key: str, got: Any, *allowed: Any) -> None:
        """Raises UnsupportedCheckpointError unless a value is one of those allowed."""
        if got not in allowed:
            raise UnsupportedCheckpointError(
                f"{self.gguf.path} has {self.architecture}.{key} {got!r}; jaxbnb reads "
                f"{' and '.join(map(repr, allowed))} alone. Convert its safetensors "
                "folder instead"
            )

    def factors(self, name: str, count: int) -> list[float]:
        """A small tensor of positive numbers, by which frequencies are divided."""
        tensor = self.gguf.tensors[name]
        if tensor.shape != (count,) or tensor.block.size > 1:
            raise CheckpointError(
                f"{self.gguf.path}: {name!r} has shape {tensor.shape}; the metadata "
                f"wants {(count,)} floats; the file is corrupt"
            )
        values = tensor.block.decode(read_rows(self.gguf, name)).ravel()
        return [
            self._checked(name, _decimal(value), lambda x: 0 < x < math.inf)
            for value in values
        ]

    def _checked(self, key: str, value: Any, allowed: Callable[[Any], bool]) -> Any:
        if not allowed(value):
            raise CheckpointError(f"{self.gguf.path}: {key!r} cannot be {value!r}")
        return value


def field(gguf: Gguf, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """One value of the metadata, by its whole key.

    Raises:
        CheckpointError: there is none and no default, or it is of another type.
    """
    value = gguf.metadata.get(key, default)
    if value is _REQUIRED:
        raise CheckpointError(
            f"{gguf.path} lacks the metadata {key!r} among its {len(gguf.metadata)} "
            "fields; is it a vocabulary without a model, or an adapter?"
        )
    if type(value) is not kind:
        raise CheckpointError(
            f"{gguf.path}: metadata {key!r} should be of type {kind.__name__}, "
            f"got {str(value)[:60]!r}"
        )
    return value


def _decimal(value: Any) -> float:
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
