"""show_example: what a model is trained on, as text."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxbnb.convert import Tokenizer
from jaxbnb.data._batches import TrainBatch
from jaxbnb.data._encoder import Example

# Tokens, and whether they are targets.
_Run = tuple[list[int], bool]
# Marks around a target, without colours.
_MARKS = ("⟦", "⟧")


def show_example(
    example: Example | TrainBatch,
    tokenizer: Tokenizer,
    *,
    max_rows: int = 1,
    titles: Sequence[str] = (),
) -> None:
    """Prints the text of tokens, with what is a target in green or between ⟦ and ⟧.

    Colours need rich and a terminal. The documents of a packed window follow each
    other, each below a line with the numbers of its tokens and targets.

    Args:
        example: result of `Encoder.encode`, or a batch.
        tokenizer: tokenizer of the model.
        max_rows: number of a batch's rows to print.
        titles: names of the documents, in their order, instead of "document 1".

    Example:
        >>> import jaxbnb
        >>> from jaxbnb.data import Encoder
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = {"2": 0, "+": 1, "4": 2, "</s>": 3}
        >>> words = Tokenizer(models.WordLevel(words, "+"))
        >>> words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        >>> tokenizer = jaxbnb.convert.Tokenizer(words, (3,), None, {})
        >>> row = {"prompt": "2+2", "completion": "4"}
        >>> show_example(Encoder(tokenizer).encode(row), tokenizer)
        --- document 1: 5 tokens, 2 targets ---
        2 + 2⟦4 </s>⟧
    """
    console = _find_console()
    for title, runs in _documents(example, max_rows, iter(titles)):
        texts = [
            (tokenizer.tokenizer.decode(ids, skip_special_tokens=False), is_target)
            for ids, is_target in runs
        ]
        if console is None:
            print(f"--- {title} ---")
            start, end = _MARKS
            print("".join(f"{start}{t}{end}" if on else t for t, on in texts))
        else:
            from rich.text import Text

            console.rule(title, align="left")
            styled = [(text, "bold green" if on else "dim") for text, on in texts]
            console.print(Text.assemble(*styled))


def _find_console() -> Any:
    """Returns rich's console; None without rich or a terminal."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console()
    return console if console.is_terminal else None


def _documents(
    example: Example | TrainBatch, max_rows: int, titles: Iterator[str]
) -> Iterator[tuple[str, list[_Run]]]:
    """Yields a title and the runs of tokens of each document."""
    if isinstance(example, Example):
        title = next(titles, "document 1")
        yield _document(title, example.tokens, example.is_target)
        return
    length = example.tokens.shape[-1]
    arrays = [
        x.reshape(-1, length)[:max_rows]
        for x in (example.tokens, example.mask, example.segment_ids)
    ]
    for row, (tokens, mask, segments) in enumerate(zip(*arrays, strict=True), 1):
        name = f"row {row}, " if len(arrays[0]) > 1 else ""
        for number in range(1, int(segments[-1]) + 1):
            inside = segments == number
            # Padding is the last segment, and has no targets.
            if number == segments[-1] and not mask[inside].any():
                yield f"{name}{int(inside.sum()):,} tokens of padding", []
            else:
                title = name + next(titles, f"document {number}")
                yield _document(title, tokens[inside], mask[inside])


def _document(
    name: str, tokens: np.ndarray, is_target: np.ndarray
) -> tuple[str, list[_Run]]:
    counts = f"{len(tokens):,} tokens, {int(is_target.sum()):,} targets"
    edges = np.flatnonzero(np.diff(is_target)) + 1
    runs = [
        (part.tolist(), bool(on[0]))
        for part, on in zip(
            np.split(tokens, edges), np.split(is_target, edges), strict=True
        )
        if len(part)
    ]
    return f"{name}: {counts}", runs
