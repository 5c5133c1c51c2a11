"""Where the tensors of a checkpoint go in a model, and whether they fit."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.convert import Checkpoint, CheckpointError, MissingTensorError
from jaxbnb.core import QuantizedArray
from jaxbnb.models._encoder_decoder_config import ModelConfig, get_layer_config
from jaxbnb.models._names import count_stacks, full_name, split_module, torch_name
from jaxbnb.models._stored import cut_columns
from jaxbnb.models._tied import rename_tensors
from jaxbnb.models.families import Family, get_family


@dataclasses.dataclass(frozen=True)
class Place:
    """The place in a model where a tensor, or a part of it, goes.

    Attributes:
        path: path of the variable.
        index: index in the stack: the layer's and, within it, the expert's, unless all
            experts share a tensor.
        shape: shape of the tensor.
        is_kernel: whether the tensor must be transposed.
        is_flipped: whether the file holds it transposed already.
        rows: rows of the tensor that go there; None for all. Each expert's, if they
            share it.
    """

    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    is_kernel: bool
    is_flipped: bool
    rows: np.ndarray | None

    def part(self, tensor: Any) -> Any:
        """Takes the part that goes there; a kernel is ``(*experts, out, in)``.

        Args:
            tensor: the tensor in the checkpoint, or a `QuantizedArray` ``(in, out)``.
        """
        if isinstance(tensor, QuantizedArray):
            return tensor if self.rows is None else cut_columns(tensor, self.rows)
        tensor = tensor.mT if self.is_flipped else tensor
        return tensor[self.at]

    def flip(self, kernel: Any) -> Any:
        """Swaps the axes of a kernel between a file's order and ours.

        A convolution's has all its axes in the other order. It is in no stack.
        """
        return kernel.mT if self.index else kernel.T

    @property
    def at(self) -> Any:
        """Index of the part in the tensor, or in its transpose if that is flipped."""
        if self.rows is None:
            return ...
        return (..., self.rows, slice(None)) if self.is_kernel else (..., self.rows)


def with_full_names(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """Returns the checkpoint with the names of transformers' complete model.

    Raises:
        CheckpointError: the checkpoint has a tensor under two names.
    """
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        name = full_name(stored, family)
        if name in names:
            raise CheckpointError(
                f"{checkpoint.path}: {names[name]} and {stored} are names of the same "
                "tensor; remove one of them"
            )
        names[name] = stored
    if not any(name.startswith(family.prefix) for name in names):
        head = torch_name(("lm_head", "kernel"), (), family)
        names = {n if n == head else family.prefix + n: s for n, s in names.items()}
    return rename_tensors(checkpoint, names)


def find_places(
    variables: dict[tuple[str, ...], nnx.Variable], config: ModelConfig
) -> dict[str, list[Place]]:
    """Returns the places of each tensor that the model needs, by the tensor's name."""
    family, sizes = get_family(config), get_layer_config(config)
    places: dict[str, list[Place]] = {}
    for path, variable in variables.items():
        shape, stacks = variable.get_value().shape, count_stacks(path)
        stack, shape = shape[:stacks], shape[stacks:]
        # A layer's experts may share a tensor, in which each kernel is flipped.
        is_shared = family.stacked_experts and stacks > 1
        stack, experts = (stack[:1], stack[1:]) if is_shared else (stack, ())
        is_kernel = path[-1] == "kernel"
        shape = shape[::-1] if is_kernel else shape
        fused, rows = family.find_rows(split_module(path)[1], sizes), None
        if fused is not None:
            rows, total = fused
            shape = (total, *shape[1:])
        is_flipped = is_kernel and bool(stacks) and not family.transposed
        is_flipped = is_flipped or (is_kernel and is_shared)
        shape = (*experts, *(shape[::-1] if is_flipped else shape))
        for index in np.ndindex(stack):
            place = Place(path, index, shape, is_kernel, is_flipped, rows)
            places.setdefault(torch_name(path, index, family), []).append(place)
    return places


def check_count(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises MissingTensorError if a config has far more layers than there are tensors.

    Each layer, and each expert in it, has tensors. This check comes before anything
    enumerates the layers.
    """
    if config.num_mlps > max(1000, len(checkpoint.tensors)):
        raise MissingTensorError(
            f"{checkpoint.path} has {len(checkpoint.tensors)} tensors; its config "
            f"describes {config.num_mlps} layers or experts. Is it from another model?"
        )


def check_tensors(
    checkpoint: Checkpoint, config: ModelConfig, places: dict[str, list[Place]]
) -> None:
    """Raises one error that lists everything wrong with a checkpoint's tensors."""
    tensors = checkpoint.tensors
    missing = [f"missing: {name}" for name in places if name not in tensors]
    problems = []
    for name, info in tensors.items():
        if name in places:
            if info.shape != places[name][0].shape:
                want = places[name][0].shape
                problems.append(f"shape: {name} is {info.shape}, the model has {want}")
            elif not jnp.issubdtype(info.dtype, jnp.floating):
                problems.append(f"dtype: {name} is {info.dtype}, which is not floating")
        elif not is_redundant(name, config):
            problems.append(f"unexpected: {name}, of shape {info.shape}")
    if missing or problems:
        kind = MissingTensorError if missing else CheckpointError
        raise kind(
            f"{checkpoint.path} does not hold the tensors of the model that its config "
            f"describes, {config}:\n  " + "\n  ".join(missing + problems)
        )


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether the config determines a tensor. Older checkpoints may still hold it."""
    family = get_family(config)
    head = torch_name(("lm_head", "kernel"), (), family)
    is_tied_head = config.tie_word_embeddings and name == head
    return is_tied_head or re.fullmatch(family.ignored, name) is not None
