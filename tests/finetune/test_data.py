import numpy as np
import pytest

from jaxbnb.finetune import pack


def test_windows_follow_the_documents():
    windows = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 4)
    assert windows.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert windows.dtype == np.int32


def test_a_separator_ends_each_document():
    windows = pack([[1, 2], [], [3]], 2, separator=0)
    assert windows.tolist() == [[1, 2], [0, 0], [3, 0]]
    # Also the last: the model learns to stop.
    assert pack([[1]], 2, separator=0).tolist() == [[1, 0]]


def test_what_is_left_is_dropped():
    assert pack([range(10)], 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pack([range(8)], 4).shape == (2, 4)
    assert pack([range(5), range(5)], 10).shape == (1, 10)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, iter], ids=lambda k: k.__name__
)
def test_documents_may_be_anything_with_ints(kind):
    documents = (kind([1, 2, 3]) for _ in range(2))
    assert pack(documents, 3, separator=0).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_no_token_is_lost_or_moved():
    rng = np.random.default_rng(0)
    documents = [
        rng.integers(1, 100, size).tolist() for size in rng.integers(0, 40, 50)
    ]
    joined = [token for document in documents for token in [*document, 0]]
    for length in (2, 7, 64):
        windows = pack(documents, length, separator=0)
        assert windows.shape == (len(joined) // length, length)
        assert windows.reshape(-1).tolist() == joined[: windows.size]


def test_refusals():
    for length in (1, 0, -3):
        with pytest.raises(ValueError, match=f"at least 2 tokens; got length={length}"):
            pack([[1, 2, 3]], length)
    with pytest.raises(ValueError, match="have 3 tokens, less than one window of 4"):
        pack([[1, 2], [3]], 4)
    with pytest.raises(ValueError, match="have 0 tokens, less than one window of 2"):
        pack([], 2)
    with pytest.raises(OverflowError):
        pack([[1, 2**31]], 2)
