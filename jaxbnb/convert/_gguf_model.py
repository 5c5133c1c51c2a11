"""A model in a GGUF file, presented as Hugging Face would: config, names, rows."""

import functools
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxbnb.convert import _gguf
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.convert._gguf_architectures import (
    ARCHITECTURES,
    ROPE_TENSORS,
    Description,
    Order,
)
from jaxbnb.convert._gguf_fields import Fields, field


class _Source(NamedTuple):
    """Where a tensor of Hugging Face's comes from."""

    # The tensor in the file, what module it is of, and of a stack which expert.
    stored: str
    module: str
    expert: int | None


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file.

    Raises:
        CheckpointError: no GGUF, a truncated or corrupt one, or one whose tensors are
            not those of the model that its metadata describes.
        UnsupportedCheckpointError: an architecture, a scaling of rope or a quantisation
            type that jaxbnb does not read, or a file that is one of several.
    """
    gguf = _gguf.read_gguf(path)
    about = describe(gguf)
    sources = _sources(gguf, about)
    tensors, encodings = {}, {}
    for name, source in sources.items():
        stored = gguf.tensors[source.stored]
        shape = stored.shape if source.expert is None else stored.shape[1:]
        if stored.block.size > 1:
            share = 1 if source.expert is None else stored.shape[0]
            encodings[name] = stored.block.name, stored.nbytes // share
        if len(shape) == 2 and source.module in about.transposed:
            shape = shape[::-1]
        tensors[name] = TensorInfo(shape, stored.block.dtype)
    return Checkpoint(
        path=path,
        config=about.config,
        tensors=types.MappingProxyType(tensors),
        reader=functools.partial(_read, gguf, about, sources),
        encodings=types.MappingProxyType(encodings),
    )


def describe(gguf: _gguf.Gguf) -> Description:
    """What the metadata say of the model."""
    architecture = field(gguf, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{gguf.path} holds the architecture {architecture!r}; of GGUF files "
            f"jaxbnb reads {', '.join(map(repr, ARCHITECTURES))}. Convert its "
            "safetensors folder instead"
        )
    count = field(gguf, "split.count", int, 1)
    if count > 1:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has split.count {count}; jaxbnb reads models in one file "
            "alone. Join them, e.g. by llama-gguf-split --merge"
        )
    return ARCHITECTURES[architecture](Fields(gguf, architecture))


def reordered(
    rows: Shaped[np.ndarray, "rows ..."], order: Order
) -> Shaped[np.ndarray, "rows ..."]:
    """Rows in another order: as three axes, of which two change places.

    Args:
        rows: a weight's rows, in values or in stored bytes, or the elements of a bias.
        order: the lengths of the axes, and the two.

    Example:
        Rope's pairs, side by side in each of two heads, as halves:

        >>> reordered(np.arange(8), ((2, -1, 2), (1, 2))).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    shape, axes = order
    split = rows.reshape(*shape, *rows.shape[1:])
    return split.swapaxes(*axes).reshape(rows.shape)


def _read(
    gguf: _gguf.Gguf, about: Description, sources: dict[str, _Source], name: str
) -> np.ndarray:
    stored, module, expert = sources[name]
    tensor, order = gguf.tensors[stored], about.orders.get(module)
    rows = _gguf.read_rows(gguf, stored, expert)
    # Rows are reordered while they are few bytes: a row is a whole number of blocks.
    is_matrix = len(tensor.shape) > 1
    if order is not None and is_matrix:
        rows = reordered(rows, order)
    shape = tensor.shape if expert is None else tensor.shape[1:]
    values = tensor.block.decode(rows).reshape(shape)
    if order is not None and not is_matrix:
        values = reordered(values, order)
    if about.is_norm_plus_one and module.endswith("norm"):
        values = values - np.ones((), values.dtype)
    return values.T if is_matrix and module in about.transposed else values


def _sources(gguf: _gguf.Gguf, about: Description) -> dict[str, _Source]:
    """Hugging Face's name -> where it is, in the order of the file."""
    foreign = [name for name in gguf.tensors if not _is_known(name, about)]
    layers = _num_layers(about)
    if foreign:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has tensors that are no part of a plain "
            f"{about.config['model_type']!r} of {layers} layers: {foreign[:5]} "
            f"({len(foreign)} in all). Convert its safetensors folder instead"
        )
    sources: dict[str, _Source] = {}
    for stored, module, name, shape in _expected(gguf, about):
        if stored not in gguf.tensors:
            raise MissingTensorError(
                f"{gguf.path} describes {layers} layers but has no tensor for "
                f"{name!r} among its {len(gguf.tensors)}; download it again"
            )
        if gguf.tensors[stored].shape != shape:
            raise CheckpointError(
                f"{gguf.path}: {name!r} has shape {gguf.tensors[stored].shape}; the "
                f"metadata wants {shape}; the file is corrupt"
            )
        if len(shape) < 3:
            sources[name] = _Source(stored, module, None)
            continue
        for expert in range(shape[0]):
            sources[name.format(expert)] = _Source(stored, module, expert)
    place = {stored: i for i, stored in enumerate(gguf.tensors)}
    return dict(sorted(sources.items(), key=lambda item: place[item[1].stored]))


def _expected(
    gguf: _gguf.Gguf, about: Description
) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Each tensor of the model, so far as it is read.

    Its name in the file, the module, Hugging Face's name, its shape. Of a stack of
    experts the name leaves "{}" for their numbers.
    """
    for module, name in about.outer.items():
        yield from _leaves(about, module, module, name, about.shape(module))
    # The count is the file's word; who reads this stops at the first that is missing.
    for layer in range(_num_layers(about)):
        for module, inner in about.inner.items():
            stored, shape = f"blk.{layer}.{module}", about.shape(module)
            name = f"{about.layers}.{layer}.{inner}"
            if len(shape) < 3 or f"{stored}.weight" in gguf.tensors:
                yield from _leaves(about, module, stored, name, shape)
                continue
            # As files had experts until 2024, one by one.
            for i in range(shape[0]):
                each = f"{stored.removesuffix('_exps')}.{i}"
                yield from _leaves(about, module, each, name.format(i), shape[1:])


def _leaves(
    about: Description, module: str, stored: str, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """The weight of a module, and its bias."""
    yield f"{stored}.weight", module, f"{name}.weight", shape
    if module in about.biases:
        yield f"{stored}.bias", module, f"{name}.bias", shape[:1]


def _is_known(name: str, about: Description) -> bool:
    """Whether a tensor of the file is one of the model's."""
    if name in ROPE_TENSORS:
        return "rope_scaling" in about.config
    found = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)(\.\d+)?\.(weight|bias)", name)
    if found is None:
        return False
    layer, module, expert, leaf = found.groups()
    if layer is None:
        is_there = expert is None and module in about.outer
    else:
        module = module if expert is None else f"{module}_exps"
        is_there = module in about.inner and int(layer) < _num_layers(about)
    return is_there and (leaf == "weight" or module in about.biases)


def _num_layers(about: Description) -> int:
    return about.config.get("num_hidden_layers") or about.config["n_layer"]
