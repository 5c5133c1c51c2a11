"""`jaxbnb inspect`: prints the contents of a checkpoint, and whether it loads."""

import argparse
import sys

from jaxbnb.convert import open_checkpoint
from jaxbnb.core.table import format_table
from jaxbnb.models import check_pretrained
from jaxbnb.models.flax_folder import is_flax_folder
from jaxbnb.models.load import abstract_pretrained
from jaxbnb.nnx import summary


def run(args: argparse.Namespace) -> int:
    """Prints formats, shapes and stored bytes, without reading weights.

    Returns:
        The exit status: 0, or 1 if the checkpoint cannot be read.
    """
    try:
        if is_flax_folder(args.path):
            return _show_state(args.path)
        checkpoint = open_checkpoint(args.path)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [("tensor", "shape", "format", "bytes")]
    sums: dict[str, list[int]] = {}
    for name, info in checkpoint.tensors.items():
        quant = checkpoint.quantized.get(name)
        kind, nbytes = checkpoint.encodings.get(name, (info.dtype.name, info.nbytes))
        if quant is not None:
            kind = f"{quant.quant_type}{', double' if quant.double_quant else ''}"
        sums.setdefault(kind, []).append(nbytes)
        if not args.summary:
            rows.append((name, str(list(info.shape)), kind, str(nbytes)))
    for kind, counts in sorted(sums.items()):
        rows.append(("all in", f"{len(counts)} tensors", kind, str(sum(counts))))
    total = sum(map(sum, sums.values()))
    rows.append(("total", f"{len(checkpoint.tensors)} tensors", "", str(total)))
    print(f"{checkpoint.path}: {checkpoint.config.get('model_type', 'no config')}")
    print(format_table(rows, num_right=1))
    print(describe_loading(args.path))
    return 0


def _show_state(path: str) -> int:
    """Prints the contents of a folder that `jaxbnb convert --to flax` wrote."""
    model = abstract_pretrained(path)
    print(f"{path}: {model.config.model_type}, the state of an NNX model")
    print(summary(model))
    print(describe_loading(path))
    return 0


def describe_loading(path: str) -> str:
    """Returns a line about whether `jaxbnb.load_pretrained` loads a checkpoint."""
    try:
        check_pretrained(path)
    except (ValueError, NotImplementedError, TypeError) as error:
        return f"jaxbnb.load_pretrained does not load it: {error}"
    return "jaxbnb.load_pretrained loads it"
