"""One step of an optimizer with 8-bit moments."""

from jaxbnb_kernels.update_8bit.api import IMPLEMENTATIONS, absmax_shape, update_8bit
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment, block_layout
from jaxbnb_kernels.update_8bit.rule import Rule

__all__ = [
    "IMPLEMENTATIONS",
    "BlockLayout",
    "Moment",
    "Rule",
    "absmax_shape",
    "block_layout",
    "update_8bit",
]
