"""The library of native CPU kernels, which XLA calls: whether it is there, and its use.

It is compiled from ``_cpu`` while jaxbnb is installed, or later:
``python -m jaxbnb_kernels._cpu.build``.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Final

import jax
import jax.ffi

from jaxbnb_kernels._config import config
from jaxbnb_kernels._cpu import build

LIBRARY = build.LIBRARY
# The handlers of the library, which are the names of XLA's custom calls too.
TARGETS: Final = tuple(
    f"jaxbnb_cpu_{name}"
    for name in (
        "attend_dense",
        "attend_dense_gradient",
        "dequantize_blockwise",
        "embed_blockwise",
        "matmul_blockwise",
        "matmul_dense",
        "matmul_int8",
        "quantize_4bit",
        "quantize_8bit",
        "quantize_linear",
        "update_8bit",
    )
)


def why_not() -> str | None:
    """Why no native kernel runs in this process, or None."""
    return _load(LIBRARY)[1]


def is_on() -> bool:
    """Whether native kernels run by themselves, on a CPU, where they serve a call."""
    return config.cpu != "never" and why_not() is None


def instruction_set() -> str | None:
    """The instruction set that the kernels use, such as "avx512"; None without them."""
    library, reason = _load(LIBRARY)
    return None if library is None or reason else library.jaxbnb_cpu_isa().decode()


def use(name: str) -> bool:
    """Makes the kernels use another instruction set, for tests and benchmarks.

    Args:
        name: a name of ``build.INSTRUCTION_SETS``, or "" for the one that they used
            first: ``JAXBNB_CPU_ISA``, or else the best one.

    Returns:
        Whether this processor has it. Otherwise nothing changes.
    """
    library, _ = _load(LIBRARY)
    name = name or os.environ.get("JAXBNB_CPU_ISA", "")
    return library is not None and library.jaxbnb_cpu_use(name.encode())


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the library and registers its handlers; or why that cannot be."""
    makes_it = "python -m jaxbnb_kernels._cpu.build makes it"
    if not build.is_for_this_machine():
        machines = " and ".join(build.INSTRUCTION_SETS)
        return None, f"cpu has kernels for Linux on {machines}"
    if not path.exists():
        return None, (
            "cpu needs the library that a C++ compiler makes when jaxbnb is "
            f"installed; {makes_it} now"
        )
    if not build.is_current(path):
        # Its kernels may take their arguments for others.
        return None, f"cpu needs the library of this version; {makes_it}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"cpu cannot load its library: {error}"
    library.jaxbnb_cpu_isa.restype = ctypes.c_char_p
    library.jaxbnb_cpu_use.restype = ctypes.c_bool
    if library.jaxbnb_cpu_isa() == b"none":
        return library, "cpu needs a processor with AVX2, FMA and F16C"
    isa = os.environ.get("JAXBNB_CPU_ISA", "")
    if not library.jaxbnb_cpu_use(isa.encode()):
        return library, (
            f"JAXBNB_CPU_ISA is {isa}, and this processor has "
            f"{', '.join(_instruction_sets(library))}"
        )
    for target in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        try:
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
        except Exception as error:
            makes_it = makes_it.replace(".build", ".build --force")
            return library, f"cpu does not fit this jaxlib; {makes_it} anew: {error}"
    return library, None


def _instruction_sets(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that this processor has, the best one in use afterwards."""
    names = [name for sets in build.INSTRUCTION_SETS.values() for name in sets]
    found = [name for name in names if library.jaxbnb_cpu_use(name.encode())]
    library.jaxbnb_cpu_use(b"")
    return found
