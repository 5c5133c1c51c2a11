"""Opens a model in a GGUF file, with Hugging Face's config, names and row order."""

import functools
import re
import types
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxbnb.convert import _gguf
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.convert._gguf_architectures import ARCHITECTURES
from jaxbnb.convert._gguf_description import Description, RowOrder
from jaxbnb.convert._gguf_fields import Fields, read_field
from jaxbnb.convert._gguf_rope import ROPE_TENSORS
from jaxbnb.core import QuantizedArray


class _Source(NamedTuple):
    """Where one of Hugging Face's tensors comes from.

    Attributes:
        stored: name of the tensor in the file.
        module: GGUF's name of its module.
        expert: index of the expert in a stack of them, or None.
    """

    stored: str
    module: str
    expert: int | None


class Expected(NamedTuple):
    """A tensor that a model with this description has.

    Attributes:
        stored: name of the tensor in the file.
        module: GGUF's name of its module.
        name: Hugging Face's name, with "{}" for the number of an expert in a stack.
        shape: shape in the file.
    """

    stored: str
    module: str
    name: str
    shape: tuple[int, ...]


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file.

    Raises:
        CheckpointError: the file is not GGUF, is truncated or corrupt, or its tensors
            are not those of the model that its metadata describes.
        UnsupportedCheckpointError: jaxbnb does not read this architecture, scaling of
            rope or quantisation type.
    """
    gguf = _gguf.read_gguf(path)
    description = describe(gguf)
    sources = _find_sources(gguf, description)
    tensors, encodings, packable = {}, {}, {}
    for name, source in sources.items():
        stored = gguf.tensors[source.stored]
        shape = stored.shape if source.expert is None else stored.shape[1:]
        if stored.block.size > 1:
            share = 1 if source.expert is None else stored.shape[0]
            encodings[name] = stored.block.name, stored.nbytes // share
        if len(shape) == 2 and source.module in description.transposed:
            shape = shape[::-1]
        tensors[name] = TensorInfo(shape, stored.block.dtype)
        if len(shape) == 2 and stored.block.config is not None:
            packable[name] = stored.block.config
    return Checkpoint(
        path=path,
        config=description.config,
        tensors=types.MappingProxyType(tensors),
        reader=functools.partial(_read, gguf, description, sources),
        quantized_reader=functools.partial(_read_quantized, gguf, description, sources),
        encodings=types.MappingProxyType(encodings),
        packable=types.MappingProxyType(packable),
    )


def describe(gguf: _gguf.Gguf) -> Description:
    """Returns the model that the metadata describes."""
    architecture = read_field(gguf, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{gguf.path} holds the architecture {architecture!r}; from GGUF files, "
            f"jaxbnb reads {', '.join(map(repr, ARCHITECTURES))}. Convert the model's "
            "safetensors folder instead"
        )
    return ARCHITECTURES[architecture](Fields(gguf, architecture))


def reorder(
    rows: Shaped[np.ndarray, "rows ..."], order: RowOrder
) -> Shaped[np.ndarray, "rows ..."]:
    """Reorders rows: splits them into three axes and swaps two of these.

    Args:
        rows: rows of a weight, as values or as stored bytes, or elements of a bias.
        order: sizes of the three axes, and the two axes to swap.

    Example:
        Rope's pairs, neighbours in each of two heads, become halves:

        >>> reorder(np.arange(8), ((2, -1, 2), (1, 2))).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    shape, axes = order
    split = rows.reshape(*shape, *rows.shape[1:])
    return split.swapaxes(*axes).reshape(rows.shape)


def _read(
    gguf: _gguf.Gguf, description: Description, sources: dict[str, _Source], name: str
) -> np.ndarray:
    stored, module, expert = sources[name]
    tensor, order = gguf.tensors[stored], description.orders.get(module)
    rows = _read_rows(gguf, description, sources[name])
    is_matrix = len(tensor.shape) > 1
    shape = tensor.shape if expert is None else tensor.shape[1:]
    values = tensor.block.decode(rows).reshape(shape)
    if order is not None and not is_matrix:
        values = reorder(values, order)
    if description.is_norm_plus_one and module.endswith("norm"):
        values = values - np.ones((), values.dtype)
    return values.T if is_matrix and module in description.transposed else values


def _read_rows(
    gguf: _gguf.Gguf, description: Description, source: _Source
) -> np.ndarray:
    """Reads stored bytes, with the rows of a matrix in Hugging Face's order.

    A row is a whole number of blocks, and takes fewer bytes before it is decoded.
    """
    rows = _gguf.read_rows(gguf, source.stored, source.expert)
    order = description.orders.get(source.module)
    is_matrix = len(gguf.tensors[source.stored].shape) > 1
    return rows if order is None or not is_matrix else reorder(rows, order)


def _read_quantized(
    gguf: _gguf.Gguf, description: Description, sources: dict[str, _Source], name: str
) -> QuantizedArray:
    tensor = gguf.tensors[sources[name].stored]
    block = tensor.block
    assert block.config is not None
    assert block.unpack is not None
    try:
        codes, scales = block.unpack(_read_rows(gguf, description, sources[name]))
    except ValueError as error:
        raise CheckpointError(f"{gguf.path}: {name!r}: {error}") from error
    parts: dict[str, Any] = {"codes": codes, "absmax": scales}
    return QuantizedArray(
        **parts,
        nested_absmax=None,
        offset=None,
        quant_type=block.config.quant_type,
        block_size=block.size,
        axis=-2,
        axis_size=tensor.shape[-1],
        dtype=block.dtype,
    )


def _find_sources(gguf: _gguf.Gguf, description: Description) -> dict[str, _Source]:
    """Returns Hugging Face's name -> source, in the order of the file."""
    foreign = [name for name in gguf.tensors if not _is_known(name, description)]
    layers = description.num_layers
    if foreign:
        raise UnsupportedCheckpointError(
            f"{gguf.path} has tensors that do not belong to a plain "
            f"{description.config['model_type']!r} of {layers} layers: {foreign[:5]} "
            f"({len(foreign)} in all). Convert the model's safetensors folder instead"
        )
    sources: dict[str, _Source] = {}
    for stored, module, name, shape in expect_tensors(description, gguf.tensors):
        if stored not in gguf.tensors:
            raise MissingTensorError(
                f"{gguf.path} describes {layers} layers but has no tensor for "
                f"{name!r} among its {len(gguf.tensors)}; download it again"
            )
        if gguf.tensors[stored].shape != shape:
            raise CheckpointError(
                f"{gguf.path}: {name!r} has shape {gguf.tensors[stored].shape}, but "
                f"the metadata requires {shape}; the file is corrupt"
            )
        if len(shape) < 3:
            sources[name] = _Source(stored, module, None)
            continue
        for expert in range(shape[0]):
            sources[name.format(expert)] = _Source(stored, module, expert)
    place = {stored: i for i, stored in enumerate(gguf.tensors)}
    return dict(sorted(sources.items(), key=lambda item: place[item[1].stored]))


def expect_tensors(
    description: Description, stored_names: Container[str] | None = None
) -> Iterator[Expected]:
    """Yields each tensor of the model.

    Args:
        description: the model.
        stored_names: names in a file, which may have a tensor for each expert; None for
            files as they are now, with stacks of experts.
    """
    for module, name in description.outer.items():
        shape = description.weight_shape(module)
        yield from _expect_module(description, module, module, name, shape)
    # A generator, because a corrupt file may announce any number of layers. The caller
    # stops at the first missing tensor.
    for layer in range(description.num_layers):
        for module, inner in description.inner.items():
            stored, shape = f"blk.{layer}.{module}", description.weight_shape(module)
            name = f"{description.layers}.{layer}.{inner}"
            is_stacked = stored_names is None or f"{stored}.weight" in stored_names
            if len(shape) < 3 or is_stacked:
                yield from _expect_module(description, module, stored, name, shape)
                continue
            # Until 2024, files stored each expert as a tensor of its own.
            for i in range(shape[0]):
                single = f"{stored.removesuffix('_exps')}.{i}"
                yield from _expect_module(
                    description, module, single, name.format(i), shape[1:]
                )


def _expect_module(
    description: Description,
    module: str,
    stored: str,
    name: str,
    shape: tuple[int, ...],
) -> Iterator[Expected]:
    """Yields the weight of a module and, if it has one, the bias."""
    yield Expected(f"{stored}.weight", module, f"{name}.weight", shape)
    if module in description.biases:
        yield Expected(f"{stored}.bias", module, f"{name}.bias", shape[:1])


def _is_known(name: str, description: Description) -> bool:
    """Whether a tensor of the file belongs to the model."""
    if name in ROPE_TENSORS:
        return "rope_scaling" in description.config
    found = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)(\.\d+)?\.(weight|bias)", name)
    if found is None:
        return False
    layer, module, expert, leaf = found.groups()
    if layer is None:
        is_there = expert is None and module in description.outer
    else:
        module = module if expert is None else f"{module}_exps"
        is_there = module in description.inner and int(layer) < description.num_layers
    return is_there and (leaf == "weight" or module in description.biases)
