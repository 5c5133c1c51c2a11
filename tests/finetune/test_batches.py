"""What people pass as a batch: tokens and mask, or an error that names the batch."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.data import TrainBatch
from jaxbnb.finetune._data import Batch, as_batch, check_batches, check_values

TOKENS = np.asarray([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
MASK = np.asarray([[0, 1, 1, 0], [0, 0, 1, 1]])
LABELS = np.where(MASK, TOKENS, -100)


class Tensor:
    """Stands for a PyTorch tensor: NumPy converts it to an array."""

    def __init__(self, x):
        self.x = np.asarray(x)
        self.ndim = self.x.ndim

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


ALONE = {
    "NumPy": TOKENS,
    "int64": TOKENS.astype(np.int64),
    "uint16": TOKENS.astype(np.uint16),
    "JAX": jnp.asarray(TOKENS),
    "tensor": Tensor(TOKENS),
    "lists": TOKENS.tolist(),
    "a list of rows": list(TOKENS),
    "a list of one tensor": [Tensor(TOKENS)],
    "a tuple of one": (TOKENS,),
    "no mask": (TOKENS, None),
    "a list without a mask": [Tensor(TOKENS), None],
    "input_ids": {"input_ids": TOKENS},
    "UserDict": collections.UserDict({"input_ids": TOKENS.tolist(), "labels": None}),
    "labels": {"input_ids": TOKENS, "labels": TOKENS},
    "all real": {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)},
}


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_tokens(given):
    tokens, mask, *_ = as_batch(given, "batch 1")
    np.testing.assert_array_equal(tokens, TOKENS)
    assert mask.shape == TOKENS.shape
    assert mask.dtype == bool
    assert mask.all()


MASKED = {
    "a pair": (TOKENS, MASK),
    "bool": (TOKENS, MASK.astype(bool)),
    "float": (TOKENS, MASK.astype(np.float32)),
    "JAX": (jnp.asarray(TOKENS), jnp.asarray(MASK)),
    "a list of tensors": [Tensor(TOKENS), Tensor(MASK)],
    "lists": (TOKENS.tolist(), MASK.tolist()),
    "labels": {"input_ids": TOKENS, "labels": LABELS},
    "on a device": {"input_ids": jnp.asarray(TOKENS), "labels": jnp.asarray(LABELS)},
}


@pytest.mark.parametrize("given", MASKED.values(), ids=MASKED)
def test_tokens_and_mask(given):
    tokens, mask, *_ = as_batch(given, "batch 1")
    np.testing.assert_array_equal(tokens, TOKENS)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK)


def test_padding():
    """After the tokens it stays; before them each row is turned, labels and all."""
    right = {"input_ids": [[3, 1, 0, 0], [5, 9, 2, 0]], "attention_mask": MASK_RIGHT}
    tokens, mask, *_ = as_batch(right, "batch 1")
    np.testing.assert_array_equal(tokens, right["input_ids"])
    np.testing.assert_array_equal(mask, MASK_RIGHT)
    left = {
        "input_ids": [[0, 0, 3, 1], [0, 5, 9, 2]],
        "attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]],
        "labels": [[-100, -100, -100, 1], [-100, -100, 9, 2]],
    }
    tokens, mask, *_ = as_batch(left, "batch 1")
    np.testing.assert_array_equal(tokens, right["input_ids"])
    np.testing.assert_array_equal(mask, [[0, 1, 0, 0], [0, 1, 1, 0]])
    del left["labels"]
    _, mask, *_ = as_batch(left, "batch 1")
    np.testing.assert_array_equal(mask, MASK_RIGHT)


MASK_RIGHT = [[1, 1, 0, 0], [1, 1, 1, 0]]


class Unreadable:
    """Stands for a bfloat16 tensor of PyTorch, which has no dtype in NumPy."""

    ndim = 2

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


WRONG_TYPES = [
    (
        TOKENS.astype(np.float32),
        "tokens are of type float32; a batch is an integer",
    ),
    (jnp.asarray(TOKENS, jnp.bfloat16), "are of type bfloat16"),
    (TOKENS > 3, "are of type bool"),
    (["to be", "or not"], "are of type str"),
    (None, "are of type NoneType"),
    (iter([TOKENS]), "are of type list_iterator"),
    ([{"input_ids": [1, 2]}], "list of dicts, one for each example. .* collators"),
    (
        (TOKENS, Unreadable()),
        "values of its mask are of type Unreadable, .* BFloat16. Give",
    ),
    ({"input_ids": Unreadable()}, "its input_ids are of type Unreadable"),
    ({"input_ids": TOKENS + 0.5}, "its input_ids are of type float64"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_TYPES)
def test_other_types(given, message):
    with pytest.raises(TypeError, match=f"batch 7.*{message}"):
        as_batch(given, "batch 7")


WRONG = [
    (np.zeros((0, 5), np.int32), r"its tokens are empty, of shape \(0, 5\)"),
    ([], "are empty"),
    ([[]], "are empty"),
    (TOKENS[0], r"have shape \(4,\); .* A single row is tokens\[None\]; .* \[batch\]"),
    ((TOKENS[0], MASK[0]), r"have shape \(4,\)"),
    (np.stack([TOKENS] * 3), r"have shape \(3, 2, 4\)"),
    ([TOKENS] * 3, r"has 3 parts, .* a pair \(tokens, mask\)"),
    ((TOKENS, MASK, MASK), "has 3 parts"),
    ({"input_ids": [1, 2, 3]}, "are a single row, .* one dict of the examples"),
    ([[1, 2, 3], [4]], "differ in length, 1 to 3. Pad them and give an attention_mask"),
    ({"input_ids": [[1, 2, 3], [4]]}, "its input_ids have rows that differ in length"),
    ((TOKENS, MASK[:, 1:]), r"its mask has shape \(2, 3\), its tokens \(2, 4\)"),
    ((TOKENS[:, :-1], TOKENS[:, 1:]), "mask has the value 4; .* Targets need not be"),
    ({"tokens": TOKENS}, "is a dict with 'tokens'; it needs input_ids, and may have"),
    ({}, "is a dict with no keys"),
    ({"input_ids": TOKENS, "position_ids": TOKENS}, "'position_ids'; .* Leave out"),
    (
        {"input_ids": TOKENS, "labels": np.roll(TOKENS, -1, 1)},
        "label of row 0, position 0, is 1, but the token is 3. .* do not shift",
    ),
    ({"input_ids": TOKENS, "labels": [1, 0]}, r"labels have shape \(2,\)"),
    (
        {"input_ids": TOKENS, "attention_mask": [[1, 1, 1, 1], [1, 0, 1, 0]]},
        "row 1 has padding between its tokens",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_fits_no_batch(given, message):
    with pytest.raises(ValueError, match=f"batch 7:? .*{message}"):
        as_batch(given, "batch 7")


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_tokens_outside_the_vocabulary(kind):
    check_values(as_batch(kind(TOKENS), "batch 7"), 10, "batch 7")
    with pytest.raises(
        ValueError,
        match=r"batch 7: token 9 of row 1, position 1, is outside the model's "
        r"vocabulary, 0 to 8\. Padding",
    ):
        check_values(as_batch(kind(TOKENS), "batch 7"), 9, "batch 7")
    with pytest.raises(ValueError, match=r"token -100 of row 0, .*, and 3 more are"):
        check_values(as_batch(kind(LABELS), "batch 7"), 10, "batch 7")


def test_no_targets():
    first_alone = np.zeros((2, 4), bool)
    first_alone[:, 0] = True
    for given in ((TOKENS, first_alone), TOKENS[:, :1]):
        batch = as_batch(given, "batch 7")
        with pytest.raises(ValueError, match="batch 7 has no targets: in its 2 rows"):
            check_values(batch, 10, "batch 7")


@pytest.mark.peers
def test_a_mask_of_torch_in_bfloat16():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match="batch 7: the values of its mask are of type Tensor"
    ):
        as_batch((TOKENS, torch.ones(2, 4, dtype=torch.bfloat16)), "batch 7")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TOKENS, r"an array of shape \(2, 4\); .* give \[batch\]"),
        (jnp.asarray(TOKENS[0]), r"an array of shape \(4,\)"),
        ({"input_ids": TOKENS}, "of type dict"),
        (None, "of type NoneType"),
    ],
)
def test_a_batch_where_batches_are_needed(given, message):
    with pytest.raises(TypeError, match=message):
        check_batches(given)


def test_batches():
    for given in ([TOKENS], iter([TOKENS]), np.stack([TOKENS])):
        check_batches(given)


def test_segments():
    """Documents of a packed row; padding becomes a document of its own."""
    packed = {"input_ids": TOKENS, "segment_ids": np.ones_like(TOKENS)}
    np.testing.assert_array_equal(as_batch(packed, "batch 1").segment_ids, 1)
    left = {
        "input_ids": [[0, 0, 3, 1], [0, 5, 9, 2]],
        "attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]],
        "segment_ids": [[0, 0, 1, 2], [0, 1, 1, 1]],
    }
    segments = as_batch(left, "batch 1").segment_ids
    np.testing.assert_array_equal(segments, [[1, 2, 3, 3], [1, 1, 1, 3]])
    wrong = {"input_ids": [[3, 1]], "segment_ids": [[2, 1]]}
    with pytest.raises(ValueError, match="row 0 does after position 0"):
        as_batch(wrong, "batch 1")


def test_a_batch_of_files():
    """One micro-batch is a batch; several keep their axis."""
    for count in (1, 2):
        tokens = np.stack([TOKENS] * count)
        ones = np.ones_like(tokens)
        batch = as_batch(TrainBatch(tokens, ones > 0, ones, (0,)), "batch 1")
        assert batch.tokens.shape == (TOKENS.shape if count == 1 else tokens.shape)
        np.testing.assert_array_equal(batch.segment_ids, 1)


def test_values_of_several_micro_batches():
    """Each has one row: the first axis is not that of the rows."""
    tokens = TOKENS[:, None]
    check_values(Batch(tokens, np.ones(tokens.shape, bool)), 100, "batch 1")
    first = np.zeros(tokens.shape, bool)
    first[..., 0] = True
    with pytest.raises(ValueError, match="batch 1 has no targets"):
        check_values(Batch(tokens, first), 100, "batch 1")
    with pytest.raises(ValueError, match="row 1"):
        check_values(Batch(tokens, ~first), int(TOKENS[1].max()), "batch 1")
