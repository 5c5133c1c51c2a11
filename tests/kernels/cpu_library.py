"""The library of native CPU kernels in tests: skips them where it cannot run."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxbnb_kernels import native
from jaxbnb_kernels._cpu import build

ISAS = sorted(build.INSTRUCTION_SETS.get(platform.machine(), {}))


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
