"""Builds the library of the native CPU kernels for tests, and registers its handlers."""

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from jaxbnb_kernels._cpu.build import INSTRUCTION_SETS, build


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled once a process; skips the test where that cannot be."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler, c++, to build the native kernels with")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "_native.so"
        build(out, Path(jax.ffi.include_dir()))
        native = ctypes.CDLL(str(out))
    native.jaxbnb_cpu_isa.restype = ctypes.c_char_p
    native.jaxbnb_cpu_use.restype = ctypes.c_bool
    for name in ("jaxbnb_cpu_matmul_blockwise",):
        handler = jax.ffi.pycapsule(getattr(native, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return native


ISAS = sorted({isa for isas in INSTRUCTION_SETS.values() for isa in isas})


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Runs the kernels of one instruction set; skips where the processor lacks it."""
    native = library()
    if not native.jaxbnb_cpu_use(isa.encode()):
        pytest.skip(f"this processor does not have {isa}")
    try:
        yield
    finally:
        native.jaxbnb_cpu_use(b"")
