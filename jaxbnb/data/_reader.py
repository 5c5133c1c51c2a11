"""Rows to examples that fit into a window, and what is left out or cut."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import jax

from jaxbnb.core.processes import gather
from jaxbnb.data._dataset import Dataset
from jaxbnb.data._encoder import Encoder, Example
from jaxbnb.data._errors import DataError

Truncation = Literal["end", "start", "error", "skip"]

# Rows to tokenise at once: the library's results take about 100 bytes a token.
_ENCODED: Final = 256
_ENCODED_CHARACTERS: Final = 1 << 20
# Rows that processes exchange at once.
_EXCHANGED: Final = 4096
# Two of the reasons why rows are left out.
NOT_ENCODED: Final = "the row cannot be encoded"
NO_TARGET: Final = "nothing in the row is a target"


@dataclasses.dataclass
class Statistics:
    """What `Batches` has read and returned so far, over all epochs.

    Rows are counted when the chunk with them is read, and the rest with each batch.

    Attributes:
        rows: rows that were read.
        truncated: rows that were longer than a window and lost tokens.
        skipped: number of rows that were left out, by reason.
        notes: number of rows with each of `Example.notes`.
        windows: rows of batches, without those that only pad the last batch.
        tokens: tokens in batches, without padding.
        targets: tokens that are targets.
        positions: all places for tokens in batches.
    """

    rows: int = 0
    truncated: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    windows: int = 0
    tokens: int = 0
    targets: int = 0
    positions: int = 0

    @property
    def efficiency(self) -> float:
        """Share of the places in batches that hold a token; the rest is padding."""
        return self.tokens / self.positions if self.positions else 0.0


class ExampleReader:
    """Encodes rows and fits their examples into a window. Text may be longer.

    Args:
        dataset: the rows.
        encoder: encoder of the rows.
        seq_length: number of tokens in a window.
        truncation: what to do with longer examples that are not text.
        is_shared: whether the processes of `jax.distributed` share the work.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        seq_length: int,
        truncation: Truncation,
        is_shared: bool = False,
    ):
        self._dataset = dataset
        self._encoder = encoder
        self._seq_length = seq_length
        self._truncation = truncation
        self._is_shared = is_shared
        self._warned: set[str] = set()

    def read(
        self, rows: Sequence[int], statistics: Statistics
    ) -> Iterator[tuple[int, Example]]:
        """Yields the numbers and examples of those rows that have targets.

        Args:
            rows: numbers of rows.
            statistics: where to count them.

        Raises:
            DataError: a row cannot be encoded, or is too long.
        """
        encode = self._encode_together if self._is_shared else self._encode
        for row, example in encode(rows):
            statistics.rows += 1
            kept = self._keep(row, example, statistics)
            if kept is not None:
                yield row, kept

    def _encode(self, rows: Sequence[int]) -> Iterator[tuple[int, Example | DataError]]:
        for numbers, part in self._read_parts(rows):
            examples = self._encoder.encode_batch(part)
            yield from zip(numbers, examples, strict=True)

    def _encode_all(self, rows: Sequence[int]) -> list[tuple[int, Example | DataError]]:
        return list(self._encode(rows))

    def _encode_together(
        self, rows: Sequence[int]
    ) -> Iterator[tuple[int, Example | DataError]]:
        """Encodes the rows that all processes ask for; each reads its own part."""
        count, index = jax.process_count(), jax.process_index()
        for start in range(0, len(rows), _EXCHANGED):
            part = rows[start : start + _EXCHANGED]
            ours = part[index::count]
            found = gather(
                "reading the data", functools.partial(self._encode_all, ours)
            )
            for place in range(len(part)):
                yield found[place % count][place // count]

    def _read_parts(
        self, rows: Sequence[int]
    ) -> Iterator[tuple[list[int], list[dict]]]:
        """Yields rows, with their numbers, in parts that are encoded at once."""
        numbers, part, size = [], [], 0
        for row in rows:
            numbers.append(row)
            part.append(self._dataset[row])
            size += len(str(part[-1]))
            if len(part) == _ENCODED or size > _ENCODED_CHARACTERS:
                yield numbers, part
                numbers, part, size = [], [], 0
        if part:
            yield numbers, part

    def _keep(
        self, row: int, example: Example | DataError, statistics: Statistics
    ) -> Example | None:
        if isinstance(example, DataError):
            if self._dataset.on_error == "raise":
                raise DataError(f"{self._dataset.describe(row)}: {example}")
            _count(statistics.skipped, NOT_ENCODED)
            self._warn(row, f"left out, as others like it: {example}", "encoded")
            return None
        for note in example.notes:
            _count(statistics.notes, note)
            self._warn(row, note, note)
        if not example.is_target.any():
            _count(statistics.skipped, NO_TARGET)
            return None
        length = len(example.tokens)
        if example.is_text or length <= self._seq_length:
            return example
        if self._truncation == "error":
            raise DataError(
                f"{self._dataset.describe(row)} has {length:,} tokens, more than "
                f"seq_length, which is {self._seq_length:,}; raise it, or choose "
                "another truncation"
            )
        if self._truncation == "skip":
            _count(statistics.skipped, "longer than seq_length")
            return None
        cut = (
            slice(self._seq_length)
            if self._truncation == "end"
            else slice(-self._seq_length, None)
        )
        is_target = example.is_target[cut].copy()
        is_target[0] = False
        if not is_target.any():
            _count(statistics.skipped, "truncation cuts all targets off")
            other = ", or set truncation='start'" if self._truncation == "end" else ""
            self._warn(
                row,
                f"{length:,} tokens are more than seq_length, and cut at their "
                f"{self._truncation} to {self._seq_length:,} they have no target, so "
                "the row is left out, as others like it. Raise seq_length" + other,
                "no target left",
            )
            return None
        statistics.truncated += 1
        self._warn(
            row,
            f"{length:,} tokens are more than seq_length, so they are cut at their "
            f"{self._truncation} to {self._seq_length:,}; statistics count the rows "
            "that this happens to",
            "truncated",
        )
        return example._replace(tokens=example.tokens[cut], is_target=is_target)

    def _warn(self, row: int, note: str, kind: str) -> None:
        """Warns of the first row of a kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{self._dataset.describe(row)}: {note}", stacklevel=2)


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1
