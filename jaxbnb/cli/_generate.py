"""`jaxbnb generate`: continues a prompt."""

import argparse
import sys

from jaxbnb.cli import _model


def run(args: argparse.Namespace) -> int:
    """Prints the continuation as it is generated.

    Returns:
        The exit status: 0, or 1 after ``error: ...``.
    """
    try:
        writer = _model.load(args)
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        if args.chat:
            message = {"role": "user", "content": prompt}
            token_ids = writer.tokenizer.encode_chat([message])
        else:
            token_ids = writer.tokenizer.encode(prompt)
        try:
            for piece in writer.write(token_ids, args.seed):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            # Ends the line that was printed so far.
            print(flush=True)
            raise
        print()
    except BrokenPipeError:
        raise
    except _model.ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
