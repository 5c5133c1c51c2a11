"""Cuts documents into windows of tokens, and reads batches in any form people pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from jaxbnb.data import TrainBatch
from jaxbnb.models.tokens import as_array, check_vocabulary, token_array


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
) -> Int32[np.ndarray, "windows {length}"]:
    """Joins tokenised documents and cuts them into windows of equal length.

    Windows do not overlap. The remainder at the end is dropped.

    Args:
        documents: token ids of each document.
        length: number of tokens in a window.
        separator: token to append to each document, e.g. the end-of-text token; None
            to append nothing.

    Raises:
        ValueError: ``length`` is less than 2, or the documents do not fill one window.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], 3, separator=0).tolist()
        [[1, 2, 3], [0, 4, 5]]
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens; got length={length}")
    ending = [] if separator is None else [separator]
    parts = [np.asarray([*document, *ending], np.int32) for document in documents]
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    windows = len(tokens) // length
    if windows == 0:
        raise ValueError(
            f"the documents have {len(tokens)} tokens, less than one window of {length}"
        )
    return tokens[: windows * length].reshape(windows, length)


class Batch(NamedTuple):
    """A batch in the form that the loss takes.

    Attributes:
        tokens: token ids, of any integer dtype.
        mask: whether each token counts as a target; None for all.
        segment_ids: number of the document of each token, as in `CausalLM`; None for a
            document in each row.
        source_ids: tokens that the encoder of an `EncoderDecoderLM` reads; None for a
            decoder.
        source_mask: whether each of these is real, and not padding.
    """

    tokens: Int[np.ndarray | jax.Array, "*accumulate batch seq"]
    mask: Bool[np.ndarray | jax.Array, "*accumulate batch seq"] | None
    segment_ids: Int[np.ndarray | jax.Array, "*accumulate batch seq"] | None = None
    source_ids: Int[np.ndarray | jax.Array, "*accumulate batch source"] | None = None
    source_mask: Bool[np.ndarray | jax.Array, "*accumulate batch source"] | None = None


# How transformers marks a token that is not a target.
_NOT_A_LABEL = -100
_KEYS = ("input_ids", "attention_mask", "labels", "segment_ids")
_TAKEN = (
    "a batch is an integer array (rows, tokens), a pair (tokens, mask), or a dict with "
    "input_ids and optionally attention_mask, labels and segment_ids"
)
_SINGLE = "A single row is tokens[None]; a single batch is given to fit as [batch]"
_PADDING = "Pad them and give an attention_mask, or see jaxbnb.finetune.pack"
_COLLATE = (
    "Make one dict of the examples, with input_ids of shape (rows, tokens), as "
    "transformers' data collators do"
)


def check_batches(batches: Any) -> None:
    """Raises TypeError for a single batch instead of an iterable of batches."""
    # An array of three axes is a sequence of batches.
    if getattr(batches, "ndim", 3) < 3:
        kind = f"an array of shape {tuple(batches.shape)}"
    elif isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        kind = f"of type {type(batches).__name__}"
    else:
        return
    raise TypeError(
        f"batches are {kind}; they must be a list, or another iterable, of batches. "
        "For a single batch, give [batch]"
    )


def as_batch(x: Any, name: str) -> Batch:
    """Returns the tokens and mask of a batch in any form that `fit` takes.

    Args:
        x: an array or a list of rows, a pair of tokens and mask, a dict with
            transformers' names, or a `TrainBatch`.
        name: name of the batch in errors, e.g. "batch 3".

    Raises:
        TypeError: it is none of these, or does not hold integers.
        ValueError: a shape, a key or a mask does not fit a batch.
    """
    if isinstance(x, Mapping):
        return _read_dict(x, name)
    if isinstance(x, TrainBatch):
        return flatten(x)
    if isinstance(x, list | tuple) and x and isinstance(x[0], Mapping):
        raise TypeError(f"{name} is a list of dicts, one for each example. {_COLLATE}")
    parts = _split_parts(x)
    if parts is None:
        tokens = _as_tokens(x, name, "tokens")
        return Batch(tokens, np.ones(tokens.shape, np.bool_))
    tokens = _as_tokens(parts[0], name, "tokens")
    if len(parts) > 2:
        raise ValueError(
            f"{name} has {len(parts)} parts, the first of shape {tokens.shape}; "
            f"{_TAKEN}"
        )
    if len(parts) == 1 or parts[1] is None:
        return Batch(tokens, np.ones(tokens.shape, np.bool_))
    return Batch(tokens, _as_mask(parts[1], tokens.shape, name, "mask"))


def as_pair_batch(x: Any, name: str, *, start: int, pad: int) -> Batch:
    """Returns the batch of an encoder-decoder: sources, and targets to learn.

    Args:
        x: a dict with transformers' names: ``input_ids``, ``labels`` (-100 for tokens
            that are not targets) and optionally ``attention_mask``.
        name: see `as_batch`.
        start: token that every target begins with.
        pad: token that stands for labels that are not targets.

    Raises:
        TypeError: it is not such a dict, or does not hold integers.
        ValueError: a key or a shape does not fit.

    Example:
        >>> batch = {"input_ids": [[5, 6, 1]], "labels": [[8, 1, -100, -100]]}
        >>> batch = as_pair_batch(batch, "batch 1", start=0, pad=0)
        >>> batch.tokens.tolist(), batch.mask.astype(int).tolist()
        ([[0, 8, 1, 0, 0]], [[0, 1, 1, 0, 0]])
    """
    if not isinstance(x, Mapping):
        raise TypeError(
            f"{name} is of type {type(x).__name__}; a batch of an encoder-decoder is a "
            "dict with input_ids, labels and optionally attention_mask"
        )
    fields = {key: value for key, value in x.items() if value is not None}
    required, allowed = {"input_ids", "labels"}, {*_KEYS} - {"segment_ids"}
    if not required <= {*fields} <= allowed:
        raise ValueError(
            f"{name} has {sorted(map(str, fields))}; a batch of an encoder-decoder has "
            "input_ids, labels and optionally attention_mask"
        )
    source = _as_tokens(fields["input_ids"], name, "input_ids")
    labels = np.asarray(_as_tokens(fields["labels"], name, "labels"))
    if len(labels) != len(source):
        raise ValueError(
            f"{name} has {len(source)} rows of input_ids and {len(labels)} of labels"
        )
    real = np.ones(source.shape, np.bool_)
    if "attention_mask" in fields:
        real = _as_mask(fields["attention_mask"], source.shape, name, "attention_mask")
    mask = labels != _NOT_A_LABEL
    tokens = np.where(mask, labels, pad)
    tokens = np.pad(tokens, [(0, 0), (1, 0)], constant_values=start)
    return Batch(tokens, np.pad(mask, [(0, 0), (1, 0)]), None, source, real)


def flatten(batch: TrainBatch) -> Batch:
    """Returns a batch for a step, without an axis for a single micro-batch."""
    arrays = (batch.tokens, batch.mask, batch.segment_ids)
    return Batch(*(x[0] if len(x) == 1 else x for x in arrays))


def check_values(batch: Batch, vocab_size: int, name: str) -> None:
    """Raises ValueError for a batch that no model of this vocabulary can learn from.

    Args:
        batch: a batch; its arrays are fetched if they are on a device.
        vocab_size: size of the model's vocabulary.
        name: see `as_batch`.
    """
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    # Several micro-batches are checked as one batch with all of their rows.
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
    check_vocabulary(tokens, vocab_size, name)
    if batch.source_ids is not None:
        source = np.asarray(batch.source_ids)
        source = source.reshape(-1, source.shape[-1])
        check_vocabulary(source, vocab_size, f"{name}, input_ids")
    if not mask[:, 1:].any():
        raise ValueError(
            f"{name} has no targets: in its {tokens.shape[0]} rows of "
            f"{tokens.shape[1]} tokens, the mask or labels keep at most the first one "
            "of a row, which nothing predicts"
        )


def _read_dict(fields: Mapping, name: str) -> Batch:
    present = {key: x for key, x in fields.items() if x is not None}
    unknown = [key for key in present if key not in _KEYS]
    if "input_ids" not in present or unknown:
        raise ValueError(
            f"{name} is a dict with {', '.join(map(repr, present)) or 'no keys'}; it "
            "needs input_ids, and may have attention_mask, labels and segment_ids. "
            "Leave out everything else: it is not used"
        )
    ids = _as_array(present["input_ids"], name, "input_ids")
    if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} is a dict, and its input_ids are a single row, like those of one "
            f"example. {_COLLATE}"
        )
    tokens = _as_tokens(ids, name, "input_ids")
    mask = np.ones(tokens.shape, np.bool_)
    if "labels" in present:
        labels = _as_array(present["labels"], name, "labels")
        mask = _mask_labels(np.asarray(labels), np.asarray(tokens), name)
    batch = Batch(tokens, mask)
    if "segment_ids" in present:
        batch = Batch(tokens, mask, _as_segments(present, tokens.shape, name))
    if "attention_mask" in present:
        real = _as_mask(present["attention_mask"], tokens.shape, name, "attention_mask")
        return _pad_right(batch, np.asarray(real), name)
    return batch


def _as_segments(fields: Mapping, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Returns the segment ids of a dict, after a check of their order."""
    ids = np.asarray(_as_array(fields["segment_ids"], name, "segment_ids"))
    if ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name}: segment_ids must be integers of the shape of input_ids, {shape}; "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    is_less = np.argwhere(np.diff(ids.astype(np.int64), axis=1) < 0)
    # Padding may have any number: it becomes a document of its own.
    if len(is_less) and "attention_mask" not in fields:
        raise ValueError(
            f"{name}: segment_ids must not decrease along a row, and row "
            f"{is_less[0][0]} does after position {is_less[0][1]}"
        )
    return ids.astype(np.int32)


def _mask_labels(labels: np.ndarray, tokens: np.ndarray, name: str) -> np.ndarray:
    """Returns whether each token has a label."""
    if labels.shape != tokens.shape:
        raise ValueError(
            f"{name}: labels have shape {labels.shape}, input_ids {tokens.shape}"
        )
    mask = labels != _NOT_A_LABEL
    wrong = np.argwhere(mask & (labels != tokens))
    if len(wrong):
        row, position = wrong[0]
        raise ValueError(
            f"{name}: the label of row {row}, position {position}, is "
            f"{labels[row, position]}, but the token is {tokens[row, position]}. "
            f"Labels are the tokens themselves, or {_NOT_A_LABEL}: each is predicted "
            "from those before it, so do not shift them"
        )
    return mask


def _pad_right(batch: Any, real: np.ndarray, name: str) -> Batch:
    """Moves a decoder's padding to the end of rows, so that no token attends to it."""
    start = real.argmax(axis=1)
    order = (np.arange(real.shape[1]) + start[:, None]) % real.shape[1]
    turned = np.take_along_axis(real, order, axis=1)
    inside = np.argwhere(turned[:, 1:] & ~turned[:, :-1])
    if len(inside):
        raise ValueError(
            f"{name}: row {inside[0][0]} has padding between its tokens; "
            "attention_mask is 1 for one stretch of tokens and 0 before or after it"
        )
    if start.any():
        batch = jax.tree.map(
            lambda x: np.take_along_axis(np.asarray(x), order, axis=1), batch
        )
    segments = batch.segment_ids
    if segments is not None:
        segments = np.where(turned, segments, segments.max() + 1)
        segments = np.asarray(segments, np.int32)
    return batch._replace(mask=batch.mask & turned, segment_ids=segments)


def _split_parts(x: Any) -> list[Any] | None:
    """Returns the tokens and mask of a batch with parts; None for a list of rows."""
    if not isinstance(x, list | tuple):
        return None
    is_short_tuple = isinstance(x, tuple) and len(x) in (1, 2)
    if is_short_tuple or (x and all(part is None or _is_array(part) for part in x)):
        return list(x)
    return None


def _is_array(x: Any) -> bool:
    if isinstance(x, list | tuple):
        return len(x) > 0 and np.ndim(x[0]) == 1
    return getattr(x, "ndim", None) == 2


def _as_array(x: Any, name: str, what: str) -> Any:
    return as_array(x, f"{name}: its {what}", _PADDING)


def _as_tokens(x: Any, name: str, what: str) -> Any:
    return token_array(x, f"{name}: its {what}", _PADDING, f"{_TAKEN}. {_SINGLE}")


def _as_mask(x: Any, shape: tuple[int, ...], name: str, what: str) -> Any:
    array = as_array(x, f"{name}: the values of its {what}", _PADDING)
    if array.shape != shape:
        raise ValueError(
            f"{name}: its {what} has shape {array.shape}, its tokens {shape}"
        )
    if array.dtype == np.bool_:
        return array
    array = np.asarray(array)
    other = array[(array != 0) & (array != 1)]
    if other.size:
        raise ValueError(
            f"{name}: its {what} has the value {other[0]}; it must be True or 1 for "
            "tokens that count and False or 0 for others. Targets need not be given: "
            "each token is predicted from those before it"
        )
    return array != 0
