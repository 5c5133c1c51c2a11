"""Embeddings that are also the head: a checkpoint may store either or both."""

import dataclasses
import types
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbnb.convert import Checkpoint
from jaxbnb.convert.file_reader import FileReader
from jaxbnb.models._encoder_decoder_config import (
    TIE,
    ModelConfig,
    read_model_config,
    untie_fields,
)
from jaxbnb.models._names import torch_name
from jaxbnb.models.families import get_family


def resolve_tied_head(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """Makes a tied checkpoint store one matrix, or unties it if it stores two.

    This follows transformers 5. If a tied model stores only the head, the head is the
    embedding too. If it stores both and they differ, it is not tied, and a warning says
    so.

    Args:
        checkpoint: checkpoint with names from `with_full_names`.
        config: its config.

    Returns:
        The same checkpoint, or one with another ``config`` or other names.
    """
    if not config.tie_word_embeddings:
        return checkpoint
    family = get_family(config)
    head = torch_name(("lm_head", "kernel"), (), family)
    embedding = torch_name(("model", "embed_tokens", "embedding"), (), family)
    if head not in checkpoint.tensors:
        return checkpoint
    if embedding not in checkpoint.tensors:
        names = {embedding if n == head else n: n for n in checkpoint.tensors}
        return rename_tensors(checkpoint, names)
    if _are_equal(checkpoint, head, embedding):
        return checkpoint
    if not family.is_tied_by_file:
        warnings.warn(
            f"{checkpoint.path}: config.json has {TIE}=true, but {head} differs from "
            f"{embedding}, so the model gets the stored head and is not tied, as in "
            f"transformers; set {TIE}=false in config.json to load it without this "
            "warning",
            stacklevel=2,
        )
    fields = untie_fields(checkpoint.config, config)
    return dataclasses.replace(checkpoint, config=fields)


def tie_like(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns ``config.json`` with a head that is tied, or not, as that of a model."""
    is_tied = config.tie_word_embeddings
    if read_model_config(fields).tie_word_embeddings == is_tied:
        return dict(fields)
    return {**untie_fields(fields, config), TIE: is_tied}


def rename_tensors(checkpoint: Checkpoint, names: dict[str, str]) -> Checkpoint:
    """Returns the checkpoint with other names for its tensors.

    Args:
        checkpoint: checkpoint to read from.
        names: old name for each new one.
    """
    if all(name == stored for name, stored in names.items()):
        return checkpoint
    tensors = {name: checkpoint.tensors[stored] for name, stored in names.items()}

    def rename(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {n: fields[stored] for n, stored in names.items() if stored in fields}
        return types.MappingProxyType(found)

    read = checkpoint.reader
    is_file = isinstance(read, FileReader)
    return dataclasses.replace(
        checkpoint,
        tensors=types.MappingProxyType(tensors),
        reader=read.rename(names) if is_file else lambda name: read(names[name]),
        quantized=rename(checkpoint.quantized),
        quantized_reader=lambda name: checkpoint.read_quantized(names[name]),
        encodings=rename(checkpoint.encodings),
        packable=rename(checkpoint.packable),
    )


def _are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors are the same matrix; reads both only if they could be."""
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    is_quantized = {first, second} & {*checkpoint.quantized}
    if a.shape != b.shape or is_quantized:
        return False
    x, y = checkpoint.read(first), checkpoint.read(second)
    if a.dtype == b.dtype:
        # Compare bytes, because NaN does not equal itself.
        x, y = (np.ascontiguousarray(z).reshape(-1).view(np.uint8) for z in (x, y))
    else:
        x, y = (z.astype(np.float32) for z in (x, y))
    return np.array_equal(x, y)
