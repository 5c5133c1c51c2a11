"""The names of layers, and of their adapters' tensors, in PEFT's files."""

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
# Metadata of an embedding or a head with another number of rows than its base's files.
RESIZED: Final = "is_resized"
PREFIX: Final = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBED_A, EMBED_B = "lora_embedding_A", "lora_embedding_B"
# PEFT saves the weight of an adapted head or embedding with the adapter, under this
# name, and the bias of an adapted layer.
BASE, BASE_BIAS = "base_layer.weight", "base_layer.bias"
TOKENS = "token_adapter.trainable_tokens_delta"
TOKENS_BASE = "token_adapter.base_layer.weight"
# What a module has if it is trained in full, or if its rows were resized.
WEIGHT, BIAS = "weight", "bias"
KINDS: Final = (
    *(A, B, MAGNITUDE, EMBED_A, EMBED_B),
    *(TOKENS, TOKENS_BASE, BASE, BASE_BIAS, WEIGHT, BIAS),
)

Tensors = dict[str, np.ndarray]


class FileLayer(NamedTuple):
    """The module of the base model's files that holds a layer.

    Attributes:
        name: name of the module, with the layer's number.
        rows: outputs of the module that belong to the layer; None for all.
        total: number of outputs of the module; None if ``rows`` is None.
    """

    name: str
    rows: Int[np.ndarray, " rows"] | None = None
    total: int | None = None


@runtime_checkable
class NamesLayers(Protocol):
    """A model that knows the names of its layers in files of its family."""

    def file_layer(self, name: str) -> FileLayer:
        """Returns the module that holds a layer, given its numbered path."""
        ...

    def file_name(self, name: str) -> str:
        """Translates a module's name from any version of transformers to the files'."""
        ...

    def is_transposed_in_files(self) -> bool:
        """Whether modules are ``Conv1D``, with kernels ``(in, out)``."""
        ...

    def peft_task(self) -> str | None:
        """PEFT's ``task_type``, by which it chooses a class; None for any model."""
        ...


class Piece(NamedTuple):
    """The adapter of one layer in PEFT's form.

    Attributes:
        name: name of the layer.
        tensors: `A`, `B` and, with DoRA, `MAGNITUDE`; or an embedding's `EMBED_A` and
            `EMBED_B`.
        scale: factor of ``B A``.
    """

    name: str
    tensors: Mapping[str, np.ndarray]
    scale: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.tensors[A if A in self.tensors else EMBED_A])


def find_file_layers(model: nnx.Module, names: Sequence[str]) -> dict[str, FileLayer]:
    """Finds the module that holds each layer; by default, one of the same name."""
    if isinstance(model, NamesLayers):
        return {name: model.file_layer(name) for name in names}
    return {name: FileLayer(name) for name in names}


def is_plain(layers: Mapping[str, FileLayer]) -> bool:
    """Whether files hold all layers under our names."""
    return all(name == layer.name for name, layer in layers.items())


def get_alpha(piece: Piece, config: LoraConfig) -> float:
    """Returns the ``lora_alpha`` that gives a piece its scale."""
    rank = math.sqrt(piece.rank) if config.use_rslora else piece.rank
    # Rounded, because the scale is a float32 close to a short decimal.
    return float(f"{piece.scale * rank:.6g}")


def has_head(model: nnx.Module, tensors: Tensors) -> bool:
    """Whether any tensor belongs to a head that a tied model does not have yet."""
    names = find_tied_head(model)
    if not names or not isinstance(model, NamesLayers):
        return False
    heads = {model.file_layer(name).name for name in names}
    return any(parse_key(model, key)[0] in heads for key in tensors)


def parse_key(model: nnx.Module, key: str) -> tuple[str, str]:
    """Returns the module of a tensor in files, and the kind of tensor."""
    name = key.removeprefix(PREFIX)
    for kind in KINDS:
        if name.endswith(f".{kind}"):
            module = name.removesuffix(f".{kind}")
            is_known = isinstance(model, NamesLayers)
            return model.file_name(module) if is_known else module, kind
    return name, ""
