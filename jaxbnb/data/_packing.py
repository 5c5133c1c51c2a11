"""Which examples share a window: best fit, the longest first."""

import bisect
from collections.abc import Sequence

import numpy as np


def pack_lengths(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Packs pieces into windows by best-fit decreasing.

    Each piece, from the longest to the shortest, goes into the fullest window that has
    room for it.

    Args:
        lengths: length of each piece, at most ``window``.
        window: length of a window.

    Returns:
        The indices of the pieces in each window. Each piece is in one window.

    Example:
        >>> pack_lengths([3, 5, 2, 4, 1], 6)
        [[1, 4], [3, 2], [0]]

    References:
        Ding et al., "Fewer Truncations Improve Language Modeling" (2024).
    """
    windows: list[list[int]] = []
    # Windows with room, as pairs of their room and their number, sorted.
    rooms: list[tuple[int, int]] = []
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, number = window, len(windows)
            windows.append([])
        else:
            room, number = rooms.pop(place)
        windows[number].append(index)
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return windows


def bucket_length(length: int, window: int) -> int:
    """Returns the length to pad to: a power of two from 64, at most a window.

    A run without packing compiles one step for each length, so there are few.

    Example:
        >>> [bucket_length(length, 700) for length in (3, 65, 513)]
        [64, 128, 700]
    """
    return min(max(64, 1 << (length - 1).bit_length()), window)


def piece_lengths(length: int, window: int) -> list[int]:
    """Returns the lengths of the pieces that a text is cut into.

    Each piece begins with the last token of the piece before. The first token of a
    window is not a target, so every token but the text's first is a target once.

    Example:
        >>> piece_lengths(10, 4), piece_lengths(3, 4)
        ([4, 4, 4], [3])
    """
    starts = range(0, max(1, length - 1), window - 1)
    return [min(window, length - start) for start in starts]
