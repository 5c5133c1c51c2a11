"""`jaxbnb inspect`: what a checkpoint holds, and whether it loads."""

import argparse
import sys

from jaxbnb.convert import open_checkpoint
from jaxbnb.core import QuantConfig
from jaxbnb.core.table import layout
from jaxbnb.models import check_pretrained
from jaxbnb.models.flax_folder import is_flax_folder
from jaxbnb.models.load import abstract_pretrained
from jaxbnb.nnx import summary


def run(args: argparse.Namespace) -> int:
    """Prints formats, shapes and true bytes; reads no weights.

    Returns:
        The exit status: 0, or 1 where the checkpoint cannot be read.
    """
    try:
        if is_flax_folder(args.path):
            return _show_state(args.path)
        checkpoint = open_checkpoint(args.path)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stored = checkpoint.stored or checkpoint
    rows = [("tensor", "shape", "format", "bytes")]
    sums: dict[str, list[int]] = {}
    for name, info in checkpoint.tensors.items():
        quant = checkpoint.quantized.get(name)
        kind, nbytes = checkpoint.encodings.get(name, (info.dtype.name, info.nbytes))
        if quant is not None:
            nbytes = sum(
                part.nbytes for key, part in stored.tensors.items() if _is_of(key, name)
            )
            kind = f"{quant.quant_type}{', double' if quant.double_quant else ''}"
        sums.setdefault(kind, []).append(nbytes)
        if not args.summary:
            rows.append((name, str(list(info.shape)), kind, str(nbytes)))
    for kind, counts in sorted(sums.items()):
        rows.append(("all in", f"{len(counts)} tensors", kind, str(sum(counts))))
    total = sum(map(sum, sums.values()))
    rows.append(("total", f"{len(checkpoint.tensors)} tensors", "", str(total)))
    print(f"{checkpoint.path}: {checkpoint.config.get('model_type', 'no config')}")
    print(layout(rows, num_right=1))
    print(loads(args.path)[1])
    return 0


def _show_state(path: str) -> int:
    """Of a folder that `jaxbnb convert --to flax` wrote."""
    model = abstract_pretrained(path)
    print(f"{path}: {model.config.model_type}, the state of an NNX model")
    print(summary(model))
    print(loads(path)[1])
    return 0


def _is_of(key: str, weight: str) -> bool:
    """Whether an array is the codes, the scales or another part of a weight."""
    module = weight.removesuffix("weight")
    others = (weight, f"{module}SCB", f"{module}weight_format")
    return key in others or key.startswith(f"{weight}.")


def loads(path: str, quant: QuantConfig | None = None) -> tuple[bool, str]:
    """Whether `jaxbnb.load_pretrained` would load a checkpoint, and a line about it."""
    try:
        check_pretrained(path, quant=quant)
    except (ValueError, NotImplementedError, TypeError) as error:
        return False, f"jaxbnb.load_pretrained does not load it: {error}"
    return True, "jaxbnb.load_pretrained loads it"
