"""Prints docs/kernels.md's table of bytes: what XLA's code moves, and what ours moves.

Run it after `make kernels`, which installs the compiler:

    PYTHONPATH=.venv/gpu:tests/kernels .venv/bin/python tests/kernels/count_bytes.py
"""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import math

import gpu_programs
import hopper_compiler

ELEMENTS = {
    "one row": math.prod(gpu_programs.ONE_ROW),
    "one row of int8": math.prod(gpu_programs.ONE_ROW),
    "whole step": math.prod(gpu_programs.PARAMETERS),
}
T4_ELEMENTS = {
    "one row in float16": ELEMENTS["one row"],
    "whole step": ELEMENTS["whole step"],
}
# Operations that move nothing.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}


def bytes_moved(text: str) -> float:
    """Adds up what each operation of an optimised program reads and writes.

    An operation reads its operands once, and writes its results. This is what a memory
    without a cache would move; what is read twice within an operation counts once.
    """
    (entry,) = re.findall(r"(?ms)^ENTRY .*?\{$(.*?)^\}", text)
    sizes, total = {}, 0.0
    line = r"(?m)^\s+(?:ROOT )?(%\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)"
    for name, shapes, operation, operands in re.findall(line, entry):
        sizes[name] = sum(_bytes_of(*shape) for shape in _shapes(shapes))
        if operation not in FREE:
            read = re.findall(r"%[\w.-]+", operands)
            total += sizes[name] + sum(sizes[x] for x in read)
    return total


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)


def _bytes_of(dtype: str, shape: str) -> float:
    itemsize = BYTES.get(dtype) or int(re.findall(r"\d+", dtype)[0]) / 8
    return itemsize * math.prod(int(n) for n in shape.split(",") if n)


if __name__ == "__main__":
    print("GPU, program: bytes an element, bytes of temporaries; XLA's code, kernels")
    for gpu, (name, *_) in hopper_compiler.GPUS.items():
        if gpu == "v100":
            continue
        elements = T4_ELEMENTS if gpu == "t4" else ELEMENTS
        for program, count in elements.items():
            row = []
            for setting in ("never", "always"):
                of = gpu_programs.compiled(gpu, tuple(elements), setting)
                moved = bytes_moved(of[program].text) / count
                row.append(f"{moved:8.2f} {of[program].temporary_bytes:12,}")
            print(f"{name:26}{program:20}", *row, flush=True)
