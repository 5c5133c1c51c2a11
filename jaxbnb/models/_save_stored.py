"""Writes quantised layers of a model as they are, for a library that loads them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxbnb.convert import TensorInfo
from jaxbnb.convert.writers import Writer, find_writer
from jaxbnb.core import QuantConfig
from jaxbnb.core.processes import fetch
from jaxbnb.models._places import Place
from jaxbnb.models.tensors import join_parts
from jaxbnb.nnx import QuantLinear, QuantParam


class Stored(NamedTuple):
    """The arrays of quantised layers.

    Attributes:
        infos: arrays by the name of the tensor that they stand for.
        config: ``quantization_config`` of the folder.
        read: ``read(tensor)`` returns the arrays by name.
    """

    infos: dict[str, dict[str, TensorInfo]]
    config: dict[str, Any]
    read: Callable[[str], Mapping[str, np.ndarray]]


def plan_stored(
    model: Any,
    variables: Mapping[Any, nnx.Variable],
    places: Mapping[str, list[Place]],
    infos: Mapping[str, TensorInfo],
    dtype: np.dtype,
    to: str,
) -> Stored:
    """Plans how the library ``to`` stores the quantised layers of a model.

    Args:
        model: model without adapters.
        variables: its variables by path.
        places: places of each tensor in them.
        infos: shape and dtype of each tensor, decoded.
        dtype: dtype of the computation.
        to: name of the library.

    Raises:
        ValueError: the layers have several formats, or none is quantised, or the
            library lacks the format, or needs weights transposed.
    """
    writer = find_writer(to)
    quant = dataclasses.replace(_find_format(model, writer), compute_dtype=dtype)
    kernels = [
        name
        for name, where in places.items()
        if where[0].is_kernel and isinstance(variables[where[0].path], QuantParam)
    ]
    matrices = {name for name, info in infos.items() if len(info.shape) == 2}
    skip = {name.removesuffix(".weight") for name in matrices.difference(kernels)}

    # The arrays of a tensor are asked for one after another.
    @functools.lru_cache(maxsize=1)
    def read(name: str) -> Mapping[str, np.ndarray]:
        parts = [
            jax.tree.map(fetch, variables[place.path].get_raw_value()[place.index])
            for place in places[name]
        ]
        q = dataclasses.replace(
            join_parts(places[name], parts), dtype=infos[name].dtype
        )
        return writer.make_arrays(name, q)

    return Stored(
        {name: writer.plan_arrays(name, infos[name], quant) for name in kernels},
        writer.make_config(quant, sorted({"lm_head", *skip})),
        read,
    )


def _find_format(model: Any, writer: Writer) -> QuantConfig:
    """Returns the one format of the quantised linear layers."""
    formats = {
        dataclasses.replace(module.config, compute_dtype=None)
        for _, module in nnx.iter_modules(model)
        if isinstance(module, QuantLinear)
    }
    if len(formats) != 1:
        got = sorted(config.quant_type for config in formats)
        raise ValueError(
            f"to={writer.name!r} writes linear layers of one format; this model's are "
            f"{got or 'not quantised'}. Leave out to, and quantise what it writes with "
            "jaxbnb.convert.convert_checkpoint"
        )
    if model.is_transposed_in_files():
        raise ValueError(
            f"{writer.name} needs the weights of a {model.config.model_type} "
            "transposed, and jaxbnb does not write these; leave out to"
        )
    (quant,) = formats
    writer.make_config(quant, ())
    return quant
