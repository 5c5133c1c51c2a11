"""`jaxbnb chat`: a conversation with a model."""

import argparse
import sys
from collections.abc import Iterator

from jaxbnb.cli import _model

_HELP = "/clear starts over, /exit or Ctrl-D leaves, Ctrl-C interrupts an answer"


def run(args: argparse.Namespace) -> int:
    """Reads messages and prints answers until the input ends.

    Returns:
        The exit status: 0, or 1 after ``error: ...``.
    """
    try:
        writer = _model.load(args)
        start = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(start)
        print(_HELP)
        for turn, text in enumerate(_read_inputs()):
            if text == "/clear":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": text})
            token_ids = writer.tokenizer.encode_chat(messages)
            answer = ""
            try:
                for piece in writer.write(token_ids, args.seed + turn):
                    print(piece, end="", flush=True)
                    answer += piece
            except KeyboardInterrupt:
                pass
            except _model.PromptTooLongError as error:
                _model.say(f"error: {error}; /clear starts over")
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
    except BrokenPipeError:
        raise
    except _model.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read_inputs() -> Iterator[str]:
    """Yields the lines that the user types."""
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text:
            yield text
