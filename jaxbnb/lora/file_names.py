"""What layers, and the tensors of their adapters, are called in PEFT's files."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._targets import find_tied_head

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
# The key of the metadata that says which ranks were added up, see `_peft_fused.join`.
SUMMANDS: Final = "jaxbnb.summands"
PREFIX: Final = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# The weight of an adapted head, which PEFT saves with the adapter.
BASE = "base_layer.weight"

Tensors = dict[str, np.ndarray]


class FileLayer(NamedTuple):
    """What a layer is in the base model's files.

    Attributes:
        name: of the module, numbered.
        rows: which of its outputs are the layer's; None for all.
        total: how many outputs it has; None where ``rows`` is.
    """

    name: str
    rows: Int[np.ndarray, " rows"] | None = None
    total: int | None = None


@runtime_checkable
class NamesLayers(Protocol):
    """A model that knows what its layers are called in files of its family."""

    def file_layer(self, name: str) -> FileLayer:
        """Of a linear layer by its dotted path, numbered."""
        ...

    def file_name(self, name: str) -> str:
        """The name in files, of one that other versions of transformers use."""
        ...

    def is_transposed_in_files(self) -> bool:
        """Whether its modules are ``Conv1D``, which have kernels as ``(in, out)``."""
        ...


class Piece(NamedTuple):
    """The adapter of one layer, as PEFT has its tensors."""

    name: str
    tensors: Mapping[str, np.ndarray]
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.tensors[A])


def find_file_layers(model: nnx.Module, names: Sequence[str]) -> dict[str, FileLayer]:
    """What each layer is in files, its own name where the model knows no other."""
    if isinstance(model, NamesLayers):
        return {name: model.file_layer(name) for name in names}
    return {name: FileLayer(name) for name in names}


def is_plain(layers: Mapping[str, FileLayer]) -> bool:
    """Whether files have all layers as they are here."""
    return all(name == layer.name for name, layer in layers.items())


def get_alpha(piece: Piece, config: LoraConfig) -> float:
    """The ``lora_alpha`` that gives a piece its scale."""
    rank = math.sqrt(piece.rank) if config.use_rslora else piece.rank
    # A float32 that was meant to be a decimal.
    return float(f"{piece.scale * rank:.6g}")


def has_head(model: nnx.Module, tensors: Tensors) -> bool:
    """Whether any tensor is for the head that a tied model would have of its own."""
    names = find_tied_head(model)
    if not names or not isinstance(model, NamesLayers):
        return False
    heads = {model.file_layer(name).name for name in names}
    return any(parse_key(model, key)[0] in heads for key in tensors)


def parse_key(model: nnx.Module, key: str) -> tuple[str, str]:
    """The module in files, and which tensor of its adapter."""
    name = key.removeprefix(PREFIX)
    for kind in (A, B, MAGNITUDE, BASE):
        if name.endswith(f".{kind}"):
            assert isinstance(model, NamesLayers)
            return model.file_name(name.removesuffix(f".{kind}")), kind
    return name, ""
