"""How other libraries pack codes: into int32 words, the first code in the lowest bits.

compressed-tensors, GPTQ and AWQ pack 4-bit and 8-bit codes in this way, along an axis
and in an order of their own. jaxbnb packs two 4-bit codes into a byte, the first one in
the high nibble.
"""

import numpy as np
from jaxtyping import Int32, UInt8


def unpack_words(
    words: Int32[np.ndarray, "*batch words"], bits: int, size: int
) -> UInt8[np.ndarray, "*batch {size}"]:
    """Unpacks codes along the last axis.

    Args:
        words: int32 words.
        bits: 4 or 8, the size of a code.
        size: number of codes; the last word may have room for more.

    Example:
        >>> unpack_words(np.array([0x76543210], np.int32), 4, 6).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    # One byte after the other, whatever the order of this machine.
    stored = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    return stored[..., :size] if bits == 8 else unpack_low_first(stored)[..., :size]


def pack_words(
    codes: UInt8[np.ndarray, "*batch n"], bits: int
) -> Int32[np.ndarray, "*batch words"]:
    """Undoes `unpack_words`; fills the last word with zeros.

    Example:
        >>> hex(pack_words(np.arange(8, dtype=np.uint8), 4).item())
        '0x76543210'
    """
    short = -codes.shape[-1] % (32 // bits)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    stored = codes if bits == 8 else pack_low_first(codes)
    return np.ascontiguousarray(stored).view("<i4").astype(np.int32, copy=False)


def unpack_low_first(
    stored: UInt8[np.ndarray, "*batch n"],
) -> UInt8[np.ndarray, "*batch 2*n"]:
    """Unpacks two 4-bit codes per byte, the first one from the low nibble.

    Example:
        >>> unpack_low_first(np.array([0x21], np.uint8)).tolist()
        [1, 2]
    """
    pairs = np.stack([stored & 15, stored >> 4], axis=-1)
    return pairs.reshape(*stored.shape[:-1], 2 * stored.shape[-1])


def pack_low_first(
    codes: UInt8[np.ndarray, "*batch n"],
) -> UInt8[np.ndarray, "*batch n//2"]:
    """Undoes `unpack_low_first`; the number of codes must be even.

    Example:
        >>> hex(pack_low_first(np.array([1, 2], np.uint8)).item())
        '0x21'
    """
    return codes[..., 0::2] | codes[..., 1::2] << 4


def pack_nibbles(
    codes: UInt8[np.ndarray, "*batch n"],
) -> UInt8[np.ndarray, "*batch half"]:
    """Packs 4-bit codes in jaxbnb's order: the first one of a byte in the high nibble.

    Example:
        >>> [hex(byte) for byte in pack_nibbles(np.array([1, 2, 3], np.uint8))]
        ['0x12', '0x30']
    """
    return swap_nibbles(
        pack_low_first(
            np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
        )
    )


def swap_nibbles(
    stored: UInt8[np.ndarray, "*shape"],
) -> UInt8[np.ndarray, "*shape"]:
    """Translates bytes of two 4-bit codes between the two orders.

    Example:
        >>> hex(swap_nibbles(np.array(0x12, np.uint8)))
        '0x21'
    """
    return stored << 4 | stored >> 4
