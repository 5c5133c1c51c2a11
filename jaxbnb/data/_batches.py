"""Batches: examples in windows of one length, in an order that can be resumed."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxbnb.data._dataset import Dataset
from jaxbnb.data._encoder import Encoder, Example
from jaxbnb.data._errors import DataError
from jaxbnb.data._files import spread
from jaxbnb.data._packing import bucket_length, pack_lengths, piece_lengths
from jaxbnb.data._reader import (
    NO_TARGET,
    NOT_ENCODED,
    ExampleReader,
    Statistics,
    Truncation,
)
from jaxbnb.data._shuffle import shuffled

# Rows that are encoded and packed together: at most so many, and so many characters on
# average. These are about a million tokens, which take seconds. Best fit leaves a
# window or two of them partly empty.
CHUNK: Final = 4096
_CHUNK_CHARACTERS: Final = 1 << 22


class TrainBatch(NamedTuple):
    """The batch of one step: micro-batches that are accumulated, of one shape.

    Attributes:
        tokens: token ids; 0 for padding.
        mask: whether each token is a target.
        segment_ids: number of the document of each token, from 1 in each row. Padding
            follows as one more.
        rows: numbers of the dataset's rows in it.
    """

    tokens: Int32[np.ndarray, "accumulate batch seq"]
    mask: Bool[np.ndarray, "accumulate batch seq"]
    segment_ids: Int32[np.ndarray, "accumulate batch seq"]
    rows: tuple[int, ...]


class _Piece(NamedTuple):
    """An example, or a part of a text, that fits into a window."""

    tokens: Int32[np.ndarray, " tokens"]
    is_target: Bool[np.ndarray, " tokens"]
    row: int


_Window = list[_Piece]


class Batches(Iterator[TrainBatch]):
    """The batches of a dataset, as an iterator with a position that can be saved.

    Rows are read in chunks of about a million tokens, and of at most 4,096 rows. With
    packing, each chunk is packed by best fit into windows of ``seq_length`` tokens.
    ``segment_ids`` keep the documents of a window apart: they see only themselves, and
    their positions begin at 0. Without packing, a window is one example, and a batch is
    padded to a power of two from 64, or to ``seq_length``.

    Text that is longer than a window is cut into several. Each begins with the last
    token of the one before, so every token is predicted once. Prompts with completions
    and chats are not cut. ``truncation`` says what happens to them.

    An epoch ends with its own last batch, which is filled up with padding.

    Args:
        dataset: the rows.
        encoder: encoder of the rows. With ``dataset.on_error == "skip"``, rows that it
            refuses are counted as skipped.
        batch_size: number of windows in a micro-batch.
        accumulate: number of micro-batches in a step.
        seq_length: number of tokens in a window.
        packing: whether several examples share a window.
        shuffle: whether rows, and the windows of a chunk, are in an order that ``seed``
            and the epoch choose. Otherwise they are in the order of the rows.
        seed: seed of the order, at least 0.
        epochs: number of passes over the dataset; None for no end.
        truncation: what to do with a chat or a completion that is longer than a window:
            cut tokens off at its "end" or its "start", raise an "error", or "skip" it.
            An example that loses all its targets is skipped.
        is_shared: whether the processes of `jax.distributed` share the work. Each reads
            and encodes its own part of the rows, and they exchange the tokens, so all
            get the same batches. Then all must ask for the same batches.

    Raises:
        DataError: a row cannot be encoded, or is too long with ``truncation="error"``;
            or an epoch has no target. The message names the row.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import jaxbnb
        >>> from jaxbnb.data import Batches, Encoder, load_dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "a"))
        >>> words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        >>> tokenizer = jaxbnb.convert.Tokenizer(words, (2,), None, {})
        >>> dataset = load_dataset([{"text": "abb"}, {"text": "b"}, {"text": "aa"}])
        >>> batches = Batches(dataset, Encoder(tokenizer), batch_size=2, seq_length=6,
        ...                   shuffle=False, epochs=1)
        >>> batch = next(batches)
        >>> batch.tokens[0].tolist()
        [[0, 1, 1, 2, 1, 2], [0, 0, 2, 0, 0, 0]]
        >>> batch.segment_ids[0].tolist()
        [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]]
        >>> batch.mask[0].astype(int).tolist(), batch.rows
        ([[0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]], (0, 1, 2))
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        *,
        batch_size: int,
        accumulate: int = 1,
        seq_length: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        truncation: Truncation = "end",
        is_shared: bool = False,
    ):
        _check_at_least(1, batch_size=batch_size, accumulate=accumulate)
        _check_at_least(2, seq_length=seq_length)
        _check_at_least(0, seed=seed)
        if epochs is not None:
            _check_at_least(1, epochs=epochs)
        if truncation not in get_args(Truncation):
            raise ValueError(
                f"truncation must be one of {get_args(Truncation)}, got {truncation!r}"
            )
        if not isinstance(dataset, Dataset):
            raise TypeError(
                "dataset must come from jaxbnb.finetune.load_dataset, got "
                f"{type(dataset).__name__}"
            )
        self.statistics = Statistics()
        self._dataset = dataset
        self._reader = ExampleReader(
            dataset, encoder, seq_length, truncation, is_shared
        )
        self._shape = accumulate, batch_size
        self._seq_length = seq_length
        self._packing = packing
        self._shuffle = shuffle
        self._seed = int(seed)
        self._epochs = epochs
        self._chunk_rows = _count_chunk_rows(dataset)
        self._num_chunks = -(-len(dataset) // self._chunk_rows)
        self._epoch = self._chunk = self._window = 0
        # The windows of the current chunk, once they are needed.
        self._windows: list[_Window] | None = None
        self._lengths: Int64[np.ndarray, " rows"] | None = None
        self._settings = {
            "num_rows": len(dataset),
            "chunk_rows": self._chunk_rows,
            "accumulate": int(accumulate),
            "batch_size": int(batch_size),
            "seq_length": int(seq_length),
            "packing": packing,
            "shuffle": shuffle,
            "seed": int(seed),
            "truncation": truncation,
            "loss_on": encoder.loss_on,
        }

    def __next__(self) -> TrainBatch:
        wanted = self._shape[0] * self._shape[1]
        taken: list[_Window] = []
        while len(taken) < wanted:
            if self._chunk == self._num_chunks:
                if taken:
                    break
                self._epoch, self._chunk = self._epoch + 1, 0
                if self.statistics.windows == 0:
                    raise self._nothing_to_learn(self.statistics)
            if self._epoch == self._epochs:
                raise StopIteration
            taken += self._take(wanted - len(taken))
        return self._collate(taken)

    def get_state(self) -> dict[str, Any]:
        """Returns the position, and what it depends on, as plain JSON."""
        return {
            "epoch": self._epoch,
            "chunk": self._chunk,
            "window": self._window,
            "settings": dict(self._settings),
            "statistics": dataclasses.asdict(self.statistics),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position: the batches that followed it follow again.

        At most a chunk of the rows is encoded again.

        Raises:
            ValueError: the position is one of batches with another dataset size or
                other settings, which would lead elsewhere.
        """
        ours, theirs = self._settings, state["settings"]
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        if differing:
            raise ValueError(
                "these batches cannot continue from a state of others: "
                + "; ".join(
                    f"{key} is {ours[key]!r} and was {theirs.get(key)!r}"
                    for key in differing
                )
            )
        self._epoch, self._chunk = state["epoch"], state["chunk"]
        self._window = state["window"]
        self.statistics = Statistics(**copy.deepcopy(state["statistics"]))
        self._windows = None

    def count_steps(self, epochs: int = 1) -> int:
        """Counts the batches of the first ``epochs`` epochs, exactly.

        The first call encodes the whole dataset once, because the lengths of all
        examples decide how they are packed. So it also finds all bad rows.

        Raises:
            DataError: see `Batches`.
        """
        _check_at_least(1, epochs=epochs)
        if self._lengths is None:
            self._lengths = self._measure()
        wanted = self._shape[0] * self._shape[1]
        steps = 0
        for epoch in range(epochs):
            windows = 0
            for chunk in range(self._num_chunks):
                lengths = [
                    part
                    for length in self._lengths[self._rows_of(epoch, chunk)].tolist()
                    if length
                    for part in piece_lengths(length, self._seq_length)
                ]
                windows += len(self._arrange(lengths))
            steps += -(-windows // wanted)
        return steps

    def _take(self, count: int) -> list[_Window]:
        """Takes windows from the current chunk, and steps beyond its end."""
        if self._windows is None:
            # With a window taken, the chunk was counted before the state was saved.
            statistics = Statistics() if self._window else self.statistics
            self._windows = self._load(self._epoch, self._chunk, statistics)
            if self._window > len(self._windows):
                raise DataError(
                    "the data has changed since the position was saved: its chunk "
                    f"{self._chunk} had more than {len(self._windows)} windows"
                )
        taken = self._windows[self._window : self._window + count]
        self._window += len(taken)
        if self._window == len(self._windows):
            self._chunk, self._window, self._windows = self._chunk + 1, 0, None
        return taken

    def _rows_of(self, epoch: int, chunk: int) -> Int64[np.ndarray, " rows"]:
        """Returns the numbers of a chunk's rows, in their order."""
        count = len(self._dataset)
        start = chunk * self._chunk_rows
        positions = np.arange(start, min(start + self._chunk_rows, count))
        if not self._shuffle:
            return positions
        return shuffled(positions, count, self._seed, epoch)

    def _load(self, epoch: int, chunk: int, statistics: Statistics) -> list[_Window]:
        rows = self._rows_of(epoch, chunk).tolist()
        pieces = [
            piece
            for row, example in self._reader.read(rows, statistics)
            for piece in _cut(example, row, self._seq_length)
        ]
        groups = self._arrange([len(piece.tokens) for piece in pieces])
        if self._shuffle:
            # Best fit has put the longest examples into the first windows.
            order = shuffled(
                np.arange(len(groups)), len(groups), self._seed, epoch, chunk
            )
            groups = [groups[place] for place in order.tolist()]
        else:
            groups.sort(key=min)
        return [[pieces[index] for index in group] for group in groups]

    def _arrange(self, lengths: Sequence[int]) -> list[list[int]]:
        if not self._packing:
            return [[index] for index in range(len(lengths))]
        return pack_lengths(lengths, self._seq_length)

    def _nothing_to_learn(self, statistics: Statistics) -> DataError:
        reasons = "; ".join(
            f"{count:,}: {reason}" for reason, count in statistics.skipped.items()
        )
        hint = "Raise seq_length, or set truncation='start'"
        if statistics.skipped.keys() <= {NO_TARGET, NOT_ENCODED}:
            hint = "Targets are completions, text, and what the assistant says"
        return DataError(
            f"none of the {len(self._dataset):,} rows has a target within "
            f"{self._seq_length:,} tokens, so there is nothing to learn ({reasons}). "
            f"{hint}"
        )

    def _measure(self) -> Int64[np.ndarray, " rows"]:
        """Returns the length of each row's example; 0 for those left out."""
        lengths, statistics = np.zeros(len(self._dataset), np.int64), Statistics()
        for row, example in self._reader.read(range(len(lengths)), statistics):
            lengths[row] = len(example.tokens)
        if not lengths.any():
            raise self._nothing_to_learn(statistics)
        return lengths

    def _collate(self, windows: Sequence[_Window]) -> TrainBatch:
        length = self._seq_length
        if not self._packing:
            longest = max(len(piece.tokens) for (piece,) in windows)
            length = bucket_length(longest, length)
        shape = self._shape[0] * self._shape[1], length
        tokens, segments = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        mask = np.zeros(shape, bool)
        rows: dict[int, None] = {}
        count = 0
        for index, window in enumerate(windows):
            start = 0
            for number, (piece, is_target, row) in enumerate(window, 1):
                stop = start + len(piece)
                tokens[index, start:stop] = piece
                mask[index, start:stop] = is_target
                segments[index, start:] = number
                rows[row] = None
                start = stop
            segments[index, start:] = len(window) + 1
            count += start
        self.statistics.windows += len(windows)
        self.statistics.tokens += count
        self.statistics.targets += int(mask.sum())
        self.statistics.positions += mask.size
        tokens, mask, segments = (
            x.reshape(*self._shape, length) for x in (tokens, mask, segments)
        )
        return TrainBatch(tokens, mask, segments, tuple(rows))


def _count_chunk_rows(dataset: Dataset) -> int:
    """Returns the number of rows in a chunk, from the length of a few of them."""
    sizes = [len(str(dataset[row])) for row in spread(len(dataset))]
    return max(1, min(CHUNK, int(_CHUNK_CHARACTERS / np.mean(sizes))))


def _cut(example: Example, row: int, length: int) -> Iterator[_Piece]:
    """Yields the pieces of an example; `piece_lengths` gives their lengths."""
    start = 0
    for count in piece_lengths(len(example.tokens), length):
        part = slice(start, start + count)
        is_target = example.is_target[part].copy()
        is_target[0] = False
        yield _Piece(example.tokens[part], is_target, row)
        start += count - 1


def _check_at_least(least: int, **arguments: Any) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
