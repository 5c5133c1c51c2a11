"""`jaxbnb plan`: whether a training run fits on a GPU."""

import argparse
import json
import sys

from jaxbnb.core.units import format_bytes
from jaxbnb.finetune import read_remat
from jaxbnb.planning import Gpu, parse_memory, plan, plot_plan
from jaxbnb.planning.measure import measure_peak

_ERRORS = (ValueError, NotImplementedError, OSError, ImportError)


def run(args: argparse.Namespace) -> int:
    """Prints the plan.

    Returns:
        The exit status: 0 whether or not it fits, or 1 after ``error: ...``.
    """
    try:
        gpu = args.gpu or Gpu(f"GPU with {args.memory}", parse_memory(args.memory))
        made = plan(
            args.model,
            gpu,
            devices=args.devices,
            mesh=args.mesh,
            sharding=args.sharding,
            quant=args.quant,
            double_quant=args.double_quant,
            optimizer=args.optimizer,
            batch=args.batch,
            seq=args.seq,
            remat=read_remat(args.remat),
            rank=args.rank,
            dtype=args.dtype,
            compile=args.compile,
        )
        measured = measure_peak(args.model, made.setting) if args.measure else None
        if args.plot:
            plot_plan(made, args.plot)
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return 1
    if args.json:
        extra = {} if measured is None else {"measured_peak": measured}
        print(json.dumps({**made.to_dict(), **extra}, indent=2))
    else:
        print(made)
        if measured is not None:
            print(f"Measured on this machine's GPU: {format_bytes(measured)}")
    return 0
