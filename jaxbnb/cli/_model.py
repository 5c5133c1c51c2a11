"""Shared by `jaxbnb generate` and `jaxbnb chat`: loading a model, writing text."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

import jaxbnb
from jaxbnb import lora
from jaxbnb.cli._choices import STORED
from jaxbnb.convert import Tokenizer, load_tokenizer, open_checkpoint
from jaxbnb.core import QuantConfig, tree_nbytes
from jaxbnb.models import EncoderModel, Llama, generate_stream, resize_token_embeddings
from jaxbnb.models.flax_folder import is_flax_folder
from jaxbnb_kernels import verification

# Errors of a wrong path, file or argument. All others are bugs in jaxbnb.
ERRORS = (ValueError, NotImplementedError, OSError, ImportError)

# Shortest padded prompt.
_SHORTEST = 16


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for a new token."""


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model with its tokenizer, and the options of the command line.

    Attributes:
        model: the model.
        tokenizer: tokenizer of the prompt and the text.
        options: arguments of the command line.
    """

    model: Llama
    tokenizer: Tokenizer
    options: argparse.Namespace

    @property
    def stops(self) -> list[int]:
        """The tokens that end a text and that the model can generate."""
        vocab_size = self.model.config.vocab_size
        return [t for t in self.tokenizer.stop_token_ids if t < vocab_size]

    def write(self, token_ids: Sequence[int], seed: int) -> Iterator[str]:
        """Yields pieces of the text that follows a prompt.

        With ``--stats`` it also prints a line of statistics at the end.

        Raises:
            PromptTooLongError: the prompt leaves no room for a new token.
            ValueError: the prompt is empty.
        """
        options = self.options
        prompt, mask = pad_left(token_ids, self.model.config.max_position_embeddings)
        room = self.model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, and this model takes at most "
                f"{self.model.config.max_position_embeddings} with its answer"
            )
        tokens = generate_stream(
            self.model,
            prompt[None],
            min(options.max_new_tokens, room),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            key=jax.random.key(seed) if options.temperature else None,
            eos_token_id=self.stops,
            attention_mask=mask[None],
            cache_dtype=options.cache_dtype,
        )
        times: list[float] = []
        yield from self.tokenizer.decode_stream(_record_times(tokens, times))
        if options.stats:
            say(_format_statistics(len(token_ids), times))


def load(options: argparse.Namespace) -> Writer:
    """Loads the model, tokenizer and adapter that the arguments name.

    Raises the same errors as `jaxbnb.load_pretrained`.
    """
    quant = options.quant
    if quant and quant != STORED:
        quant = QuantConfig(options.quant, double_quant=options.double_quant)
    if not is_flax_folder(options.model):
        # Opened first, because a missing model should be reported as such, and not as
        # a missing tokenizer.
        open_checkpoint(options.model)
    if options.adapter:
        lora.check_adapter_files(options.adapter)
    tokenizer = load_tokenizer(_find_tokenizer(options))
    # Before the model takes memory that the checks need.
    verification.verify_if_needed(announce_checks, report_check)
    start = time.perf_counter()
    model = jaxbnb.load_pretrained(options.model, quant=quant, dtype=options.dtype)
    if isinstance(model, EncoderModel):
        raise ValueError(
            f"{options.model} is a {model.config.model_type}, an encoder, which does "
            "not write text"
        )
    if getattr(model.config, "num_mel_bins", 0):
        raise ValueError(
            f"{options.model} is a {model.config.model_type}, which reads audio, not "
            "prompts. jaxbnb.models.generate takes its features, in Python"
        )
    if options.adapter:
        size = lora.saved_vocab_size(model, options.adapter)
        if size > model.config.vocab_size:
            resize_token_embeddings(model, size)
        lora.load_adapter(model, options.adapter)
    if options.stats:
        seconds, size = time.perf_counter() - start, tree_nbytes(model) / 1e6
        say(f"{options.model}: {size:,.1f} MB, loaded in {seconds:.1f} s")
    writer = Writer(model, tokenizer, options)
    if not writer.stops:
        vocab_size = model.config.vocab_size
        say(
            "the text will end only after --max-new-tokens: the checkpoint's stop "
            f"tokens are {tokenizer.stop_token_ids}, and the model has {vocab_size} "
            "tokens"
        )
    return writer


def _find_tokenizer(options: argparse.Namespace) -> str:
    """Returns the path of the tokenizer: that of the adapter, if it has its own."""
    adapter = options.adapter
    if adapter and (Path(adapter) / "tokenizer.json").is_file():
        return options.tokenizer or adapter
    return options.tokenizer or options.model


def announce_checks(device_kind: str) -> None:
    """Says that kernels are about to be checked."""
    say(f"checking jaxbnb's kernels on this {device_kind}, once, for a few minutes:")


def report_check(_: str, op: str, verdict: verification.Verdict) -> None:
    """Says what the check of an operation came to."""
    say(f"  {op}: {verdict.reason or 'ok'}")


def pad_left(token_ids: Sequence[int], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads a prompt on the left to a power of two, to compile for fewer lengths.

    Args:
        token_ids: tokens of the prompt.
        longest: largest number of tokens that the model takes.

    Returns:
        The tokens, and a mask that is False for padding.

    Example:
        >>> tokens, mask = pad_left([5, 6, 7], 2048)
        >>> len(tokens), tokens[-3:].tolist(), int(mask.sum())
        (16, [5, 6, 7], 3)
    """
    if not token_ids:
        raise ValueError("the prompt is empty; a model needs at least one token")
    length = _SHORTEST
    while length < len(token_ids):
        length *= 2
    # Pads only if half of the model's positions stay free for new tokens.
    length = length if 2 * length <= longest else len(token_ids)
    padding = length - len(token_ids)
    tokens = np.concatenate([np.zeros(padding, np.int32), np.asarray(token_ids)])
    return tokens.astype(np.int32), np.arange(length) >= padding


def _record_times(tokens: Iterator[np.ndarray], times: list[float]) -> Iterator[int]:
    """Yields the tokens of a batch of one; appends the start and each token's time."""
    times.append(time.perf_counter())
    for (token,) in tokens:
        times.append(time.perf_counter())
        yield int(token)


def _format_statistics(prompt_length: int, times: Sequence[float]) -> str:
    start, first, *_, last = (*times, times[-1])
    count = len(times) - 1
    text = (
        f"{prompt_length} tokens in the prompt, the first new one after "
        f"{first - start:.1f} s; {count} new"
    )
    # Producing the first two tokens includes compilation.
    if count > 2:
        text += f", {(count - 2) / (last - times[2]):.1f} tokens/s"
    return text


def say(text: str) -> None:
    """Prints to stderr, so that stdout has only the model's words."""
    print(text, file=sys.stderr)
