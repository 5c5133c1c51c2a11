"""A moment as implementations see it, and the layout of its blocks in a parameter."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float32, UInt8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax"),
    meta_fields=("signed",),
)
@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment of a parameter: one code per element, and one absmax per block.

    Attributes:
        codes: uint8 array in the parameter's shape.
        absmax: float32 array in the shape that `absmax_shape` returns.
        signed: whether the codes use the signed dynamic map, not the unsigned one.
    """

    codes: UInt8[Array, "*shape"]
    absmax: Float32[Array, "*blocks"]
    signed: bool


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The position of blocks in an array of some shape: see `block_layout`.

    Attributes:
        axis: axis that blocks run along; a block spans all later axes.
        step: elements of that axis in a block.
        size: elements in a block.
        absmax_shape: shape with one element per block, and the rank of the array.
    """

    axis: int
    step: int
    size: int
    absmax_shape: tuple[int, ...]


def block_layout(shape: tuple[int, ...], block_size: int) -> BlockLayout:
    """Lays out blocks of up to ``block_size`` consecutive elements.

    Blocks run along the last axis if that is as long as a block. If it is shorter, as
    in a ``(4096, 16)`` adapter, a block spans as many whole rows as fit, so that such
    shapes do not pay one absmax for every 16 elements. The rank stays the same, so one
    ``PartitionSpec`` serves the parameter, its codes and its absmax.

    Example:
        >>> block_layout((64, 1024), 256).absmax_shape
        (64, 4)
        >>> block_layout((3, 4096, 16), 256)
        BlockLayout(axis=1, step=16, size=256, absmax_shape=(3, 256, 1))
    """
    axis, inner = len(shape), 1
    while axis > 0 and inner * max(shape[axis - 1], 1) <= block_size:
        axis -= 1
        inner *= max(shape[axis], 1)
    if axis == 0:
        # The whole array is one block.
        step = max(shape[0], 1) if shape else 1
        return BlockLayout(0, step, inner, (1,) * len(shape))
    axis -= 1
    step = block_size // inner
    blocks = -(-shape[axis] // step)
    absmax_shape = (*shape[:axis], blocks, *(1 for _ in shape[axis + 1 :]))
    return BlockLayout(axis, step, step * inner, absmax_shape)
