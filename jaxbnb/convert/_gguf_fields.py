"""The metadata of a GGUF file, each field checked as it is read."""

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
    """The fields that describe a file's architecture.

    Keys are given without their prefix, the architecture. A field that is missing or
    has the wrong type or sign raises `CheckpointError`.

    Attributes:
        gguf: header of the file.
        architecture: value of ``general.architecture``.
    """

    gguf: Gguf
    architecture: str

    def size(self, key: str, default: Any = None) -> int:
        """Returns a positive int."""
        key = f"{self.architecture}.{key}"
        value = read_field(
            self.gguf, key, int, _REQUIRED if default is None else default
        )
        return self._check(key, value, lambda n: 0 < n <= 2**40)

    def count(self, key: str) -> int:
        """Returns an int that is not negative, 0 by default."""
        key = f"{self.architecture}.{key}"
        value = read_field(self.gguf, key, int, 0)
        return self._check(key, value, lambda n: 0 <= n <= 2**40)

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        """Returns a positive float as the decimal that was written to its float32.

        This is 1e-05, for example, instead of 9.999999747378752e-06.
        """
        key = f"{self.architecture}.{key}"
        value = _to_decimal(read_field(self.gguf, key, float, default))
        return self._check(key, value, lambda x: 0 < x < math.inf)

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self.gguf.metadata

    def get(self, key: str, kind: type, default: Any) -> Any:
        """Returns a value of the type ``kind``."""
        return read_field(self.gguf, f"{self.architecture}.{key}", kind, default)

    def refuse(self, key: str, got: Any, *allowed: Any) -> None:
        """Raises UnsupportedCheckpointError unless ``got`` is an allowed value."""
        if got not in allowed:
            raise UnsupportedCheckpointError(
                f"{self.gguf.path} has {self.architecture}.{key} {got!r}; jaxbnb reads "
                f"only {' or '.join(map(repr, allowed))}. Convert the model's "
                "safetensors folder instead"
            )

    def factors(self, name: str, count: int) -> list[float]:
        """Returns the positive numbers of a small tensor, divisors of frequencies."""
        tensor = self.gguf.tensors[name]
        if tensor.shape != (count,) or tensor.block.size > 1:
            raise CheckpointError(
                f"{self.gguf.path}: {name!r} has shape {tensor.shape}, but the "
                f"metadata requires {(count,)} floats; the file is corrupt"
            )
        values = tensor.block.decode(read_rows(self.gguf, name)).ravel()
        return [
            self._check(name, _to_decimal(value), lambda x: 0 < x < math.inf)
            for value in values
        ]

    def _check(self, key: str, value: Any, is_allowed: Callable[[Any], bool]) -> Any:
        if not is_allowed(value):
            raise CheckpointError(f"{self.gguf.path}: {key!r} cannot be {value!r}")
        return value


def read_field(gguf: Gguf, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Returns one value of the metadata, by its whole key.

    Raises:
        CheckpointError: the key is missing and there is no default, or the value has
            another type.
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


def _to_decimal(value: Any) -> float:
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
