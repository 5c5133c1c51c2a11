"""Builds the native CPU kernels' library for tests, and registers its handlers."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from jaxbnb_kernels._cpu import build

ISAS = sorted(build.INSTRUCTION_SETS.get(platform.machine(), {}))


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its handlers registered; skips the test where it can't be built.

    Its file is named by what it is made of, so that all processes share one.
    """
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler, c++, to build the native kernels with")
    sources = [*sorted(build.HERE.glob("*.[ch]*")), Path(build.__file__)]
    made_of = [jax.__version__.encode(), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"jaxbnb_native_{digest}.so"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        build.build(unfinished, Path(jax.ffi.include_dir()))
        unfinished.rename(path)
    native = ctypes.CDLL(str(path))
    native.jaxbnb_cpu_isa.restype = ctypes.c_char_p
    native.jaxbnb_cpu_use.restype = ctypes.c_bool
    for name in ("jaxbnb_cpu_matmul_blockwise",):
        handler = jax.ffi.pycapsule(getattr(native, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return native


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
