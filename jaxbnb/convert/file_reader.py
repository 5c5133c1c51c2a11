"""FileReader: tensors that lie in files as they are."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads tensors that a file holds as they are, and so can also be mapped.

    Attributes:
        read: function that reads one tensor.
        map: function that maps one; its bytes are read when they are used.
    """

    read: Callable[[str], np.ndarray]
    map: Callable[[str], np.ndarray]

    def __call__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        return self.read(name)

    def rename(self, names: Mapping[str, str]) -> "FileReader":
        """Returns the reader for other names.

        Args:
            names: old name for each new one.
        """
        return FileReader(
            lambda name: self.read(names[name]), lambda name: self.map(names[name])
        )
