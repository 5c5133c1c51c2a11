"""Moves the moments of one parameter between a bitsandbytes entry and ``tx``."""

import math

import jax.numpy as jnp
import numpy as np

from jaxbnb.convert._bitsandbytes_slots import Parameters, Slot
from jaxbnb.convert._bitsandbytes_state import (
    BLOCK_SIZE,
    CODEBOOKS,
    FAMILIES,
    Blocks8bit,
    Entry,
    encode,
)
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.optim.state_layout import Place, StateLayout
from jaxbnb_kernels.update_8bit import block_layout


def load_moments(
    entry: Entry,
    layout: StateLayout,
    leaves: list,
    slot: Slot,
    parameters: Parameters,
) -> None:
    """Stores the moments of an entry among the leaves of the state of ``tx``."""
    entry.check_family(slot.family)
    for index, moment in zip(slot.places, FAMILIES[slot.family], strict=True):
        place, shape = layout.places[index], layout.shapes[index]
        axes = parameters.torch_axes(slot.index, len(shape))
        back = tuple(np.argsort(axes))
        stored = entry.read(moment, tuple(shape[axis] for axis in axes))
        if isinstance(stored, Blocks8bit):
            levels, size = stored.levels, stored.block_size
            absmax_shape = _match_blocks(place, shape, axes, levels, size)
            if absmax_shape is not None and place.absmax is not None:
                leaves[place.position] = jnp.asarray(stored.codes.transpose(back))
                leaves[place.absmax] = jnp.asarray(stored.absmax.reshape(absmax_shape))
                continue
            stored = stored.decode()
        if not moment.can_be_negative and np.any(stored < 0):
            raise CheckpointError(
                f"{entry.name}: state{moment.number} has negative values, which "
                f"{moment.field} of {slot.family} cannot have; another optimizer wrote "
                "it"
            )
        layout.write(leaves, index, jnp.asarray(stored.transpose(back)))


def save_moments(
    layout: StateLayout, leaves: list, slot: Slot, parameters: Parameters
) -> dict[str, np.ndarray]:
    """Returns the tensors of a parameter's entry."""
    tensors: dict[str, np.ndarray] = {}
    for index, moment in zip(slot.places, FAMILIES[slot.family], strict=True):
        place, shape = layout.places[index], layout.shapes[index]
        axes = parameters.torch_axes(slot.index, len(shape))
        levels = CODEBOOKS[moment.is_signed]
        if place.format is None:
            values = np.asarray(layout.read(leaves, index), np.float32)
            parts = {"state": values.transpose(axes)}
        elif _match_blocks(place, shape, axes, levels, BLOCK_SIZE) is not None:
            assert place.absmax is not None
            parts = {
                "state": np.asarray(leaves[place.position]).transpose(axes),
                "qmap": levels,
                "absmax": np.asarray(leaves[place.absmax]).reshape(-1),
            }
        else:
            values = np.asarray(layout.read(leaves, index))
            codes, absmax = encode(values.transpose(axes), moment)
            parts = {"state": codes, "qmap": levels, "absmax": absmax}
        for name, part in parts.items():
            key = f"{name}{moment.number}"
            if moment.row and name != "qmap":
                tensors[key] = np.stack([tensors[key], part])
            else:
                # A copy, because torch would write to the original.
                tensors[key] = np.array(part, order="C")
    if "absmax1" not in tensors and slot.family in ("ScaleByAdamState", "TraceState"):
        # LAMB and LARS expect room for a norm next to moments that are not quantised.
        tensors["unorm_vec"] = np.zeros(1, np.float32)
    return tensors


def _match_blocks(
    place: Place,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    levels: np.ndarray,
    block_size: int,
) -> tuple[int, ...] | None:
    """Returns the absmax's shape if ``tx`` has the file's blocks and map, else None.

    Args:
        place: place of the moment in the state of ``tx``.
        shape: shape of the parameter in ``params``.
        axes: axes of the parameter in torch's order.
        levels: levels of the file's codes.
        block_size: block size of the file. Its blocks divide the flattened tensor.
    """
    format_ = place.format
    if format_ is None or format_.signed is None:
        return None
    if not np.array_equal(levels, CODEBOOKS[format_.signed]):
        return None
    # An axis of size 1 may be anywhere.
    long_axes = [axis for axis in axes if shape[axis] > 1]
    if long_axes != sorted(long_axes):
        return None
    layout = block_layout(shape, format_.block_size)
    if math.prod(layout.absmax_shape) == 1:
        return layout.absmax_shape if math.prod(shape) <= block_size else None
    row, rows = math.prod(shape[layout.axis :]), math.prod(shape[: layout.axis])
    is_same = layout.size == block_size and (row % block_size == 0 or rows == 1)
    return layout.absmax_shape if is_same else None
