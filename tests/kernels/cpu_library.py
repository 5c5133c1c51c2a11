"""The library of native CPU kernels in tests: skips them where it cannot run."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxbnb_kernels import native
from jaxbnb_kernels._cpu import build

# The instruction sets of products, and of those of integers.
ISAS = list(build.sets_of("matmul_blockwise", platform.machine()))
INT8_ISAS = list(build.sets_of("matmul_int8", platform.machine()))


def library() -> None:
    """Skips the test where the library is not installed."""
    if reason := native.why_not():
        pytest.skip(reason)


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Runs the kernels of one instruction set; skips where the processor lacks it."""
    library()
    if not native.use(isa):
        pytest.skip(f"this processor does not have {isa}")
    try:
        yield
    finally:
        native.use("")


alone = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1,
    reason="this system does not limit a process to one of several processors",
)

_ON_ONE_PROCESSOR = """
import os, pathlib, sys
# XLA starts as many threads as the processors that a process may use.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
sys.path[:0] = {path}
from jaxbnb_kernels import native
native.LIBRARY = pathlib.Path({library!r})
import {module}
sys.stdout.write({module}.digest_of_results())
"""


def check_threads(module: str, digest: str) -> None:
    """Checks that ``digest_of_results`` of a test module is the same in one thread."""
    path = [os.path.dirname(__file__), *sys.path]
    code = _ON_ONE_PROCESSOR.format(
        path=path, library=str(native.LIBRARY), module=module
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert child.stdout == digest
