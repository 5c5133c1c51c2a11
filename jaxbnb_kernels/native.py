"""The library of native CPU kernels, which XLA calls: whether it is there, and its use.

It is compiled from ``_cpu`` while jaxbnb is installed, or later:
``python -m jaxbnb_kernels._cpu.build``.
"""

import ctypes
import functools
from pathlib import Path
from typing import Final

import jax
import jax.ffi

LIBRARY = Path(__file__).parent / "_cpu" / "_native.so"
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


def instruction_set() -> str | None:
    """The instruction set that the kernels use, such as "avx512"; None without them."""
    library, reason = _load(LIBRARY)
    return None if library is None or reason else library.jaxbnb_cpu_isa().decode()


def use(name: str) -> bool:
    """Makes the kernels use another instruction set, for tests and benchmarks.

    Args:
        name: a name of ``build.INSTRUCTION_SETS``, or "" for the best one again.

    Returns:
        Whether this processor has it. Otherwise nothing changes.
    """
    library, _ = _load(LIBRARY)
    return library is not None and library.jaxbnb_cpu_use(name.encode())


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the library and registers its handlers; or why that cannot be."""
    if not path.exists():
        return None, (
            "cpu needs the library that a C++ compiler makes when jaxbnb is "
            "installed; python -m jaxbnb_kernels._cpu.build makes it now"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"cpu cannot load its library: {error}"
    library.jaxbnb_cpu_isa.restype = ctypes.c_char_p
    library.jaxbnb_cpu_use.restype = ctypes.c_bool
    if library.jaxbnb_cpu_isa() == b"none":
        return library, "cpu needs a processor with AVX2, FMA and F16C"
    if missing := [target for target in TARGETS if not hasattr(library, target)]:
        return library, (
            f"cpu needs the library of this version, which has {', '.join(missing)}; "
            "python -m jaxbnb_kernels._cpu.build makes it"
        )
    for target in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        try:
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
        except Exception as error:
            return library, f"cpu does not fit this jaxlib, build it again: {error}"
    return library, None
