"""The formats: the codebook, block size and options of each ``quant_type``."""

import dataclasses
from typing import Final

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    E2M1,
    E4M3,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    NF4,
    SIGNED4,
    SIGNED8,
    UNSIGNED4,
    UNSIGNED8,
)
from jaxbnb_kernels.quantize_blockwise.scales import ScaleType

# Has one absmax a row, and multiplies integers, with jaxbnb_kernels.matmul_int8.
LLM_INT8: Final = "llm_int8"

# Has no negative levels: for second moments of optimizers, not for weights.
UNSIGNED: Final = "dynamic8_unsigned"

CODEBOOKS: Final[dict[str, np.ndarray | None]] = {
    "nf4": NF4,
    "fp4": FP4,
    "int4": INT4,
    # Linear: the levels are the integers -127 ... 127 over 127, and need no table.
    "int8": None,
    LLM_INT8: None,
    "dynamic8": DYNAMIC8_SIGNED,
    UNSIGNED: DYNAMIC8_UNSIGNED,
    "fp8_e4m3": FP8_E4M3,
    "fp8_e5m2": FP8_E5M2,
    "mxfp4": E2M1,
    "nvfp4": E2M1,
    "int4_scaled": SIGNED4,
    "int8_scaled": SIGNED8,
    "uint4": UNSIGNED4,
    "uint8": UNSIGNED8,
    "fp8_scaled": E4M3,
}
WEIGHT_FORMATS: Final = tuple(name for name in CODEBOOKS if name != UNSIGNED)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A format that stores a scale for each block, where others store the absmax.

    An element is its level times the scale. Levels are not in [-1, 1]. These are the
    formats of checkpoints that other libraries quantised.

    Attributes:
        bits: 4 or 8, the size of a code.
        block_size: default number of elements that share a scale.
        is_fixed: whether the format has only this block size.
        scale_type: 8-bit float that scales are stored as; None for float32.
        has_zero_point: whether each block has a number that its levels are less by.
        largest: number that an absmax is divided by to get the scale, unless there is a
            zero point or a ``scale_type``.
    """

    bits: int
    block_size: int
    is_fixed: bool = False
    scale_type: ScaleType | None = None
    has_zero_point: bool = False
    largest: float = 1.0


SCALED: Final = {
    "mxfp4": Scaled(4, 32, is_fixed=True, scale_type="e8m0"),
    "nvfp4": Scaled(4, 16, is_fixed=True, scale_type="e4m3"),
    # The largest magnitude may be the lowest integer or, if positive, is clipped.
    "int4_scaled": Scaled(4, 64, largest=7.5),
    "int8_scaled": Scaled(8, 64, largest=127.5),
    "uint4": Scaled(4, 64, has_zero_point=True),
    "uint8": Scaled(8, 64, has_zero_point=True),
    "fp8_scaled": Scaled(8, 128, largest=448.0),
}

# The types that inputs of a product may be rounded to.
ACT_DTYPES: Final = {
    "fp8_e4m3": np.dtype(jnp.float8_e4m3fn),
    "fp8_e5m2": np.dtype(jnp.float8_e5m2),
}

_BLOCK_SIZE: Final = 64
# The value of the paper, and the default of transformers.
_OUTLIER_THRESHOLD: Final = 6.0


def codebook(quant_type: str) -> np.ndarray | None:
    """Returns the float32 levels of a format, indexed by code; None for linear int8.

    Raises:
        ValueError: the format is unknown; the message lists all.

    Example:
        >>> codebook("nf4")[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    if not isinstance(quant_type, str) or quant_type not in CODEBOOKS:
        raise ValueError(
            f"quant_type {quant_type!r} is not known; choose one of {list(CODEBOOKS)}"
        )
    return CODEBOOKS[quant_type]


def check_weight_format(quant_type: str) -> None:
    """Raises ValueError unless a weight may have the format; the message lists all.

    Example:
        >>> check_weight_format("nf4")
    """
    if not isinstance(quant_type, str) or quant_type not in CODEBOOKS:
        raise ValueError(
            f"quant_type {quant_type!r} is not known; choose one of "
            f"{list(WEIGHT_FORMATS)}"
        )
    if quant_type == UNSIGNED:
        raise ValueError(
            f"{UNSIGNED!r} has no negative levels, and weights need them: give "
            "'dynamic8'. jaxbnb.quantize takes it, for second moments"
        )


def is_packed(quant_type: str) -> bool:
    """Returns whether two codes share a byte."""
    levels = codebook(quant_type)
    return levels is not None and len(levels) == 16


def choose_block_size(
    quant_type: str, block_size: int | None, act_quant_type: str | None = None
) -> int | None:
    """Returns ``block_size`` or the format's default; None for the whole axis.

    Raises:
        ValueError: it is not a positive even int, or the format takes none or another.

    Example:
        >>> choose_block_size("nf4", None), choose_block_size("nf4", 128)
        (64, 128)
        >>> choose_block_size("mxfp4", None)
        32
        >>> choose_block_size("llm_int8", None)
    """
    if act_quant_type is not None:
        if block_size is not None:
            raise ValueError(
                f"with act_quant_type={act_quant_type!r} a whole row has one absmax, "
                "because several would not factor out of the product: leave "
                f"block_size out; got {block_size!r}"
            )
        return None
    if quant_type == LLM_INT8:
        if block_size is not None:
            raise ValueError(
                "llm_int8 has one absmax for a whole row, so it takes no block_size; "
                f"got {block_size!r}. The format with blocks is 'int8'"
            )
        return None
    scaled = SCALED.get(quant_type)
    if block_size is None:
        return _BLOCK_SIZE if scaled is None else scaled.block_size
    check_block_size(block_size)
    if scaled is not None and scaled.is_fixed and block_size != scaled.block_size:
        raise ValueError(
            f"{quant_type} has blocks of {scaled.block_size} elements by definition; "
            f"leave block_size out, got {block_size}"
        )
    return block_size


def whole_axis_block_size(size: int) -> int:
    """Returns the ``block_size`` of an axis that is one block: even, and not 0.

    Example:
        >>> [whole_axis_block_size(size) for size in (64, 63, 0)]
        [64, 64, 2]
    """
    return max(2, size + size % 2)


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless ``block_size`` is a positive even int."""
    is_int = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not is_int or block_size < 2 or block_size % 2:
        raise ValueError(
            f"block_size must be a positive even int, commonly 64; got {block_size!r}"
        )


def check_double_quant(quant_type: str, double_quant: bool) -> None:
    """Raises ValueError if the format has too few absmax to quantise them."""
    if double_quant and quant_type == LLM_INT8:
        raise ValueError(
            "llm_int8 has one absmax for a whole row, which double_quant would not "
            "make smaller; leave it out"
        )
    if double_quant and quant_type in SCALED:
        raise ValueError(
            f"{quant_type} stores scales as other libraries do, which double_quant "
            "would change; leave it out"
        )


def choose_outlier_threshold(
    quant_type: str, outlier_threshold: float | None
) -> float | None:
    """Returns ``outlier_threshold`` or 6.0 for llm_int8; None for all other formats.

    Raises:
        ValueError: the format takes none, or it is not a non-negative number.

    Example:
        >>> choose_outlier_threshold("llm_int8", None)
        6.0
        >>> choose_outlier_threshold("nf4", None)
    """
    if quant_type != LLM_INT8:
        if outlier_threshold is not None:
            raise ValueError(
                f"outlier_threshold is for llm_int8 alone; {quant_type} multiplies its "
                f"inputs as they are. Got {outlier_threshold!r}"
            )
        return None
    if outlier_threshold is None:
        return _OUTLIER_THRESHOLD
    is_number = isinstance(outlier_threshold, int | float) and not isinstance(
        outlier_threshold, bool
    )
    if not is_number or not outlier_threshold >= 0:
        raise ValueError(
            f"outlier_threshold must be positive, commonly {_OUTLIER_THRESHOLD}, or 0 "
            f"for no outliers; got {outlier_threshold!r}"
        )
    return float(outlier_threshold)


def check_act_quant_type(quant_type: str, act_quant_type: str | None) -> None:
    """Raises ValueError unless inputs of this type can multiply the weight's.

    Example:
        >>> check_act_quant_type("fp8_e4m3", "fp8_e5m2")
        >>> check_act_quant_type("nf4", None)
    """
    if act_quant_type is None:
        return
    if not isinstance(act_quant_type, str) or act_quant_type not in ACT_DTYPES:
        raise ValueError(
            f"act_quant_type must be one of {list(ACT_DTYPES)}, or None for inputs as "
            f"they are; got {act_quant_type!r}"
        )
    if quant_type not in ACT_DTYPES:
        raise ValueError(
            f"act_quant_type={act_quant_type!r} multiplies fp8 by fp8, so quant_type "
            f"must be one of {list(ACT_DTYPES)}; got {quant_type!r}"
        )
