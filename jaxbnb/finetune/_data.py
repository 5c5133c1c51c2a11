"""Token windows out of documents."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
) -> Int32[np.ndarray, "windows {length}"]:
    """Joins tokenised documents and cuts them into windows of equal length.

    Windows do not overlap; what is left at the end is dropped.

    Args:
        documents: token ids of each document.
        length: tokens in a window.
        separator: token put after each document, e.g. the end-of-text token.

    Raises:
        ValueError: ``length`` is less than 2, or the documents do not fill one window.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], 3, separator=0).tolist()
        [[1, 2, 3], [0, 4, 5]]
    """
    if length < 2:
        raise ValueError(f"a window has at least 2 tokens; got length={length}")
    ending = [] if separator is None else [separator]
    parts = [np.asarray([*document, *ending], np.int32) for document in documents]
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    windows = len(tokens) // length
    if windows == 0:
        raise ValueError(
            f"the documents have {len(tokens)} tokens, less than one window of {length}"
        )
    return tokens[: windows * length].reshape(windows, length)
