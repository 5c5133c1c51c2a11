"""How GGUF stores numbers: blocks along the last axis, each with a scale."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from jaxbnb.convert._packing import pack_nibbles
from jaxbnb.core import QuantConfig
from jaxbnb.core.extras import import_extra

# Codes, and scales of blocks, of rows.
Parts = tuple[UInt8[np.ndarray, "rows code_bytes"], Any]


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        name: ggml's spelling.
        size: elements in a block.
        nbytes: bytes in a block.
        dtype: dtype after decoding: float32, except that 16-bit floats keep theirs.
        decode: stored bytes ``(rows, row_bytes)`` -> values ``(rows, n)``.
        config: format of ours that holds the same values, or None.
        unpack: stored bytes -> codes and scales in that format.
    """

    name: str
    size: int
    nbytes: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]
    config: QuantConfig | None = None
    unpack: Callable[[np.ndarray], Parts] | None = None


def name_type(kind: int) -> str:
    """Returns ggml's name of a type that is not in `BLOCK_TYPES`, if we know it.

    Example:
        >>> name_type(15), name_type(99)
        ('Q8_K', 'type 99')
    """
    return _UNSUPPORTED_NAMES.get(kind, f"type {kind}")


def _decode_float(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows.view(dtype)


def decode_q8_0(
    rows: UInt8[np.ndarray, "rows row_bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """Decodes blocks of 34 bytes: a float16 scale d, and 32 int8 q. Values are ``d q``.

    Example:
        >>> block = np.float16(0.5).tobytes() + bytes(range(32))
        >>> decode_q8_0(np.frombuffer(block, np.uint8)[None])[0, :4].tolist()
        [0.0, 0.5, 1.0, 1.5]
    """
    blocks = rows.reshape(-1, 34)
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    with _allow_non_finite():
        values *= _read_half(blocks, 0)
    return values.reshape(len(rows), -1)


def unpack_q8_0(rows: UInt8[np.ndarray, "rows row_bytes"]) -> Parts:
    """Returns the codes and scales of Q8_0 in ``int8_scaled``.

    Example:
        >>> block = np.float16(0.5).tobytes() + bytes(range(32))
        >>> codes, scales = unpack_q8_0(np.frombuffer(block, np.uint8)[None])
        >>> codes[0, :3].tolist(), scales.tolist()
        ([128, 129, 130], [[0.5]])
    """
    blocks = rows.reshape(-1, 34)
    # The codes of int8_scaled count from -128.
    codes = blocks[:, 2:] + np.uint8(128)
    return codes.reshape(len(rows), -1), _read_half(blocks, 0).reshape(len(rows), -1)


def unpack_q4_0(rows: UInt8[np.ndarray, "rows row_bytes"]) -> Parts:
    """Returns the codes and scales of Q4_0 in ``int4_scaled``.

    Example:
        >>> block = np.float16(0.5).tobytes() + bytes([0x21] * 16)
        >>> codes, scales = unpack_q4_0(np.frombuffer(block, np.uint8)[None])
        >>> codes[0, [0, 8]].tolist(), scales.tolist()
        ([17, 34], [[0.5]])
    """
    blocks = rows.reshape(-1, 18)
    codes = _pack_halves(blocks[:, 2:]).reshape(len(rows), -1)
    return codes, _read_half(blocks, 0).reshape(len(rows), -1)


def unpack_mxfp4(rows: UInt8[np.ndarray, "rows row_bytes"]) -> Parts:
    """Returns the codes and scales of MXFP4: 17 bytes, of which the first is E8M0.

    Raises:
        ValueError: a scale is 255. ggml decodes it as 2^128, and E8M0 as NaN.

    Example:
        >>> block = bytes([127] + [0x21] * 16)
        >>> codes, scales = unpack_mxfp4(np.frombuffer(block, np.uint8)[None])
        >>> codes[0, [0, 8]].tolist(), scales.tolist()
        ([17, 34], [[127]])
    """
    blocks = rows.reshape(-1, 17)
    if (blocks[:, 0] == 255).any():
        raise ValueError("a scale of MXFP4 is 255, which is NaN; the file is corrupt")
    codes = _pack_halves(blocks[:, 1:]).reshape(len(rows), -1)
    return codes, blocks[:, 0].reshape(len(rows), -1)


def decode_nibbles(
    rows: UInt8[np.ndarray, "rows row_bytes"], *, has_high: bool, has_min: bool
) -> Float32[np.ndarray, "rows n"]:
    """Decodes Q4_0, Q4_1, Q5_0 and Q5_1: 32 elements a block.

    Values are ``d q + m`` in types ``_1``. In types ``_0`` they are ``d q``, after half
    its range is subtracted from q. A block has, in this order: float16 d; float16 m
    (only ``_1``); the fifth bit of each q in 4 bytes (only ``Q5``); the other four bits
    in 16 bytes, with the first 16 elements in the low nibbles and the rest in the high
    ones.

    Example:
        >>> block = np.float16([0.5, -1.0]).tobytes() + bytes([0x20] * 16)
        >>> rows = np.frombuffer(block, np.uint8)[None]
        >>> decode_nibbles(rows, has_high=False, has_min=True)[0, [0, 16]].tolist()
        [-1.0, 0.0]
    """
    head = 4 if has_min else 2
    blocks = rows.reshape(-1, head + 4 * has_high + 16)
    q = _split_nibbles(blocks[:, -16:]).reshape(len(blocks), 32)
    if has_high:
        bits = blocks[:, head : head + 4]
        q = q | np.unpackbits(bits, axis=1, bitorder="little") << 4
    values = q.astype(np.float32)
    with _allow_non_finite():
        if has_min:
            values = values * _read_half(blocks, 0) + _read_half(blocks, 2)
        else:
            values = (values - (16 if has_high else 8)) * _read_half(blocks, 0)
    return values.reshape(len(rows), -1)


def decode_k(
    rows: UInt8[np.ndarray, "rows row_bytes"], *, has_high: bool
) -> Float32[np.ndarray, "rows n"]:
    """Decodes Q4_K and Q5_K: 256 elements a block, in eighths of 32.

    Values are ``d s q - e m``, with s and m for each eighth. A block has, in this
    order: float16 d and e; all s and m, 6 bits each, in 12 bytes; the fifth bit of each
    q in 32 bytes (only ``Q5_K``), where each eighth has one bit of every byte; the
    other four bits in 128 bytes, where 32 bytes hold two eighths, in low and high
    nibbles.

    Example:
        >>> scales = bytes([3] * 4 + [0] * 4 + [3] * 4)
        >>> block = np.float16([0.5, 0.0]).tobytes() + scales + bytes([0x21] * 128)
        >>> rows = np.frombuffer(block, np.uint8)[None]
        >>> decode_k(rows, has_high=False)[0, ::32].tolist()
        [1.5, 3.0, 1.5, 3.0, 1.5, 3.0, 1.5, 3.0]
    """
    blocks = rows.reshape(-1, 16 + 32 * has_high + 128)
    q = _split_nibbles(blocks[:, -128:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    if has_high:
        eighths = np.arange(8, dtype=np.uint8)[:, None]
        q = q | (blocks[:, 16:48][:, None] >> eighths & 1) << 4
    first, second, mixed = np.split(blocks[:, 4:16], 3, axis=1)
    s = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=1)
    m = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=1)
    with _allow_non_finite():
        values = q * (_read_half(blocks, 0) * s)[..., None]
        values -= (_read_half(blocks, 2) * m)[..., None]
    return values.reshape(len(rows), -1)


def decode_q6_k(
    rows: UInt8[np.ndarray, "rows row_bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """Decodes Q6_K: 256 elements in a block of 210 bytes, in sixteenths of 16.

    Values are ``d s (q - 32)``, with s for each sixteenth. A block has, in this order:
    the low four bits of each q in 128 bytes, the high two in 64, int8 s, and float16 d.
    Each half of a block consists of four quarters of 32 elements. For the low bits, the
    first two quarters are the low nibbles of 2 x 32 bytes, and the other two the high
    nibbles. For the high bits, all four share 32 bytes, with two bits of each.

    Example:
        >>> block = bytes([0x10] * 128) + bytes(64) + bytes([2] * 16)
        >>> block += np.float16(0.5).tobytes()
        >>> decode_q6_k(np.frombuffer(block, np.uint8)[None])[0, [0, 64]].tolist()
        [-32.0, -31.0]
    """
    blocks = rows.reshape(-1, 210)
    low = _split_nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> pairs & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    with _allow_non_finite():
        values = (
            q * (_read_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]
        )
    return values.reshape(len(rows), -1)


def decode_library(
    name: str, rows: UInt8[np.ndarray, "rows row_bytes"]
) -> Float32[np.ndarray, "rows n"]:
    """Decodes a type that few files have, with the gguf package.

    Raises:
        ImportError: gguf is not installed, or is too old for the type.
    """
    library = import_extra("gguf", needed_by=f"a tensor in {name}", extra="gguf")
    kind = getattr(library.GGMLQuantizationType, name, None)
    if kind is None:
        raise ImportError(f"a tensor in {name} needs a newer gguf: pip install -U gguf")
    with _allow_non_finite():
        return library.quants.dequantize(rows, kind)


def _split_nibbles(
    packed: UInt8[np.ndarray, "*batch n"],
) -> UInt8[np.ndarray, "*batch 2 n"]:
    """Returns the low nibbles of all bytes, then the high ones."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _pack_halves(
    packed: UInt8[np.ndarray, "blocks n"],
) -> UInt8[np.ndarray, "blocks n"]:
    """Packs neighbours into a byte, where low nibbles are a block's first half."""
    return pack_nibbles(_split_nibbles(packed).reshape(len(packed), -1))


def _allow_non_finite() -> np.errstate:
    """Silences warnings: a NaN or infinite scale comes from the file."""
    return np.errstate(invalid="ignore", over="ignore")


def _read_half(
    blocks: UInt8[np.ndarray, "blocks block_bytes"], first: int
) -> Float[np.ndarray, "blocks 1"]:
    """Returns the float16 at byte ``first`` of each block, as float32."""
    half = np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)
    return half.astype(np.float32)


_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_BF16 = np.dtype(ml_dtypes.bfloat16)
# Types that the gguf package decodes: name, elements and bytes of a block. The others
# are in most files, and need no package.
_LIBRARY_TYPES: Final = {
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
}
BLOCK_TYPES: Final[dict[int, BlockType]] = {
    0: BlockType("F32", 1, 4, _F32, _decode_float(_F32)),
    1: BlockType("F16", 1, 2, _F16, _decode_float(_F16)),
    2: BlockType(
        "Q4_0",
        32,
        18,
        _F32,
        functools.partial(decode_nibbles, has_high=False, has_min=False),
        QuantConfig("int4_scaled", 32),
        unpack_q4_0,
    ),
    3: BlockType(
        "Q4_1",
        32,
        20,
        _F32,
        functools.partial(decode_nibbles, has_high=False, has_min=True),
    ),
    6: BlockType(
        "Q5_0",
        32,
        22,
        _F32,
        functools.partial(decode_nibbles, has_high=True, has_min=False),
    ),
    7: BlockType(
        "Q5_1",
        32,
        24,
        _F32,
        functools.partial(decode_nibbles, has_high=True, has_min=True),
    ),
    8: BlockType(
        "Q8_0", 32, 34, _F32, decode_q8_0, QuantConfig("int8_scaled", 32), unpack_q8_0
    ),
    12: BlockType("Q4_K", 256, 144, _F32, functools.partial(decode_k, has_high=False)),
    13: BlockType("Q5_K", 256, 176, _F32, functools.partial(decode_k, has_high=True)),
    14: BlockType("Q6_K", 256, 210, _F32, decode_q6_k),
    30: BlockType("BF16", 1, 2, _BF16, _decode_float(_BF16)),
    39: BlockType(
        "MXFP4",
        32,
        17,
        _F32,
        functools.partial(decode_library, "MXFP4"),
        QuantConfig("mxfp4"),
        unpack_mxfp4,
    ),
    **{
        kind: BlockType(
            name, size, nbytes, _F32, functools.partial(decode_library, name)
        )
        for kind, (name, size, nbytes) in _LIBRARY_TYPES.items()
    },
}
# Named in the message that a type is not supported.
_UNSUPPORTED_NAMES: Final[dict[int, str]] = {
    **{9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    41: "Q1_0",
}
