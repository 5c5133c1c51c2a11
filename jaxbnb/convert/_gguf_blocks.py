"""How GGUF stores numbers: in blocks along the last axis, each with its own scale."""

import dataclasses
from collections.abc import Callable
from typing import Final

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of GGUF.

    Attributes:
        name: as ggml spells it.
        size: elements a block.
        nbytes: bytes a block.
        dtype: what it decodes to: float32, or for 16-bit floats their own dtype.
        decode: stored bytes ``(rows, row_bytes)`` -> values ``(rows, n)``.
    """

    name: str
    size: int
    nbytes: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]


def type_name(kind: int) -> str:
    """What ggml calls a type that is not in `BLOCK_TYPES`, as far as we have heard.

    Example:
        >>> type_name(12), type_name(99)
        ('Q4_K', 'type 99')
    """
    return _UNSUPPORTED_NAMES.get(kind, f"type {kind}")


def _decode_float(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows.view(dtype)


def decode_q8_0(
    rows: UInt8[np.ndarray, "rows row_bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """34 bytes for 32 elements: a float16 scale d and int8 q; each is ``d q``.

    Example:
        >>> block = np.float16(0.5).tobytes() + bytes(range(32))
        >>> decode_q8_0(np.frombuffer(block, np.uint8)[None])[0, :4].tolist()
        [0.0, 0.5, 1.0, 1.5]
    """
    blocks = rows.reshape(-1, 34)
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    # A NaN or infinite scale is the file's own, and stays.
    with np.errstate(invalid="ignore", over="ignore"):
        values *= _half(blocks, 0)
    return values.reshape(len(rows), -1)


def decode_q4_1(
    rows: UInt8[np.ndarray, "rows row_bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """20 bytes for 32 elements: float16 d and m and 4-bit q; each is ``d q + m``.

    The low nibbles are the first 16 elements, the high ones the last.

    Example:
        >>> block = np.float16([0.5, -1.0]).tobytes() + bytes([0x20] * 16)
        >>> decode_q4_1(np.frombuffer(block, np.uint8)[None])[0, [0, 16]].tolist()
        [-1.0, 0.0]
    """
    blocks = rows.reshape(-1, 20)
    values = np.empty((len(blocks), 32), np.float32)
    values[:, :16] = blocks[:, 4:] & 0x0F
    values[:, 16:] = blocks[:, 4:] >> 4
    with np.errstate(invalid="ignore", over="ignore"):
        values *= _half(blocks, 0)
        values += _half(blocks, 2)
    return values.reshape(len(rows), -1)


def _half(
    blocks: UInt8[np.ndarray, "blocks block_bytes"], first: int
) -> Float[np.ndarray, "blocks 1"]:
    """The float16 at byte ``first`` of each block, as float32."""
    half = np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)
    return half.astype(np.float32)


_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_BF16 = np.dtype(ml_dtypes.bfloat16)
BLOCK_TYPES: Final[dict[int, BlockType]] = {
    0: BlockType("F32", 1, 4, _F32, _decode_float(_F32)),
    1: BlockType("F16", 1, 2, _F16, _decode_float(_F16)),
    3: BlockType("Q4_1", 32, 20, _F32, decode_q4_1),
    8: BlockType("Q8_0", 32, 34, _F32, decode_q8_0),
    30: BlockType("BF16", 1, 2, _BF16, _decode_float(_BF16)),
}
# For the message that one of them is not supported.
_UNSUPPORTED_NAMES: Final[dict[int, str]] = {
    **{2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"},
    **{13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8"},
    **{25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0"},
    **{35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
