"""What each ``quant_type`` is: its codebook."""

from typing import Final

import numpy as np

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED, FP4, NF4

CODEBOOKS: Final[dict[str, np.ndarray | None]] = {
    "nf4": NF4,
    "fp4": FP4,
    # Linear: the levels are the integers -127 ... 127 over 127, so there is no table.
    "int8": None,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
}


def codebook(quant_type: str) -> np.ndarray | None:
    """The float32 levels of a format, indexed by code; None for linear int8.

    Raises:
        ValueError: there is no such format; the message lists them.

    Example:
        >>> codebook("nf4")[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    if quant_type not in CODEBOOKS:
        raise ValueError(
            f"quant_type {quant_type!r} is not known; choose one of {list(CODEBOOKS)}"
        )
    return CODEBOOKS[quant_type]


def is_packed(quant_type: str) -> bool:
    """Whether two codes share a byte."""
    levels = codebook(quant_type)
    return levels is not None and len(levels) == 16


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless ``block_size`` is a positive even int."""
    is_int = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not is_int or block_size < 2 or block_size % 2:
        raise ValueError(
            f"block_size must be a positive even int, commonly 64; got {block_size!r}"
        )
