"""Compiles the native kernels: each source once per instruction set, then one library.

Uses only the standard library, as it also runs while a wheel is built. Where jax is
installed, ``python -m jaxbnb_kernels._cpu.build`` makes the library in this folder.
"""

import argparse
import functools
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
LIBRARY: Final = HERE / "_native.so"

# Floating-point operations are fused only where the source says so: results must not
# depend on the compiler.
FLAGS: Final = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-exceptions",
    "-ffp-contract=off",
    "-fvisibility=hidden",
)
# Optimised less, or compiling would take minutes.
SANITIZE: Final = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)

_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_BF16: Final = ("-mavx512bf16", "-mavx512vnni", "-mavx512vbmi")
_AMX: Final = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")

# The instruction sets of `isa.h`, and the compiler's options for each.
INSTRUCTION_SETS: Final = {
    "x86_64": {
        "avx2": _AVX2,
        "avx2_vnni": (*_AVX2, "-mavxvnni"),
        "avx512": (*_AVX2, *_AVX512),
        "avx512_vnni": (*_AVX2, *_AVX512, "-mavx512vnni"),
        "avx512_bf16": (*_AVX2, *_AVX512, *_BF16),
        "amx": (*_AVX2, *_AVX512, *_BF16, *_AMX),
    },
    "aarch64": {"neon": (), "neon_dotprod": ("-march=armv8.2-a+dotprod",)},
}

# Compiled once: they run on any processor, and may use the standard library.
_IS_COMPILED_ONCE: Final = ("module", "_ffi")
# Instruction sets that only some sources are compiled for: JAXBNB_DECLARE_BF16, _INT8.
_ONLY: Final = {
    "avx512_bf16": ("attend_dense", "matmul_blockwise", "matmul_int8"),
    "amx": ("attend_dense", "matmul_blockwise", "matmul_int8"),
    "avx2_vnni": ("matmul_int8",),
    "avx512_vnni": ("matmul_int8",),
    "neon_dotprod": ("matmul_int8",),
}


def build(
    out: Path,
    include: Path,
    *,
    compiler: str | None = None,
    sanitize: bool = False,
    machine: str | None = None,
) -> None:
    """Compiles the library.

    Args:
        out: file of the library, ``_native.so``.
        include: folder of XLA's FFI headers, ``jax.ffi.include_dir()``.
        compiler: a C++20 compiler that takes GCC's options, and perhaps some of its
            options; None for the one that ``CXX`` names, or else ``c++``.
        sanitize: whether to check addresses and undefined behaviour at run time.
        machine: the processor, as `platform.machine` names it; None for this one.

    Raises:
        RuntimeError: the compiler failed, or the machine has no kernels.
        FileNotFoundError: the compiler is missing.
    """
    command = shlex.split(compiler) if compiler else _compiler()
    machine = machine or platform.machine()
    if machine not in INSTRUCTION_SETS:
        raise RuntimeError(f"no native kernels for {machine}, only for x86_64, aarch64")
    flags = (*FLAGS, *(SANITIZE if sanitize else ()), f"-I{include}")
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):

        def compile_one(unit: tuple[Path, str, tuple[str, ...]]) -> str:
            source, isa, options = unit
            to = f"{folder}/{source.stem}.{isa}.o"
            _run(*command, *flags, *options, "-c", str(source), "-o", to)
            return to

        objects = list(pool.map(compile_one, _units(machine)))
        part = out.with_suffix(".part")
        _run(*command, *flags, *objects, "-shared", "-o", str(part))
        part.replace(out)


def why_not() -> str | None:
    """Why the library cannot be compiled here, or None."""
    if os.environ.get("JAXBNB_NATIVE") == "0":
        return "JAXBNB_NATIVE is 0"
    if not is_for_this_machine():
        machines = " and ".join(INSTRUCTION_SETS)
        return f"they are for Linux on {machines}; this is {_this_machine()}"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler, {_compiler()[0]}"
    return None


def is_for_this_machine() -> bool:
    """Whether there are kernels for this machine's system and kind of processor."""
    return sys.platform == "linux" and platform.machine() in INSTRUCTION_SETS


def is_current(library: Path = LIBRARY) -> bool:
    """Whether a library is there, and was compiled from these sources."""
    if not library.exists() or library.stat().st_size == 0:
        return False
    # The file is larger than what reading small models may take.
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(digest().encode()) >= 0


@functools.cache
def digest() -> str:
    """Returns what tells these sources from others: 32 hexadecimal digits.

    The library contains it. One of other sources may load, and compute other numbers.
    """
    sources = [*HERE.glob("*.cc"), *HERE.glob("*.h"), Path(__file__)]
    total = hashlib.sha256()
    for path in sorted(sources):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:32]


def sets_of(kernel: str, machine: str) -> dict[str, tuple[str, ...]]:
    """Returns the instruction sets that a kernel is compiled for, and their options.

    Args:
        kernel: name of a source, without its suffix.
        machine: the processor, as `platform.machine` names it.
    """
    sets = INSTRUCTION_SETS.get(machine, {})
    return {isa: o for isa, o in sets.items() if kernel in _ONLY.get(isa, (kernel,))}


def _units(machine: str) -> Iterator[tuple[Path, str, tuple[str, ...]]]:
    """What to compile: a source, the name of an instruction set, and options."""
    for source in sorted(HERE.glob("*.cc")):
        if source.stem.endswith(_IS_COMPILED_ONCE):
            yield source, "any", (f'-DJAXBNB_DIGEST="{digest()}"',)
            continue
        for isa, options in sets_of(source.stem, machine).items():
            yield source, isa, (f"-DJAXBNB_ISA={isa}", *options)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _this_machine() -> str:
    return f"{platform.system()} on {platform.machine()}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the library for this Python's jax, in this folder, unless it is current.

    Args:
        arguments: ``--force`` makes it anew, for a jaxlib that it does not fit; None
            for those of the command.

    Returns:
        The exit status: 1 if the library is not there or not current.
    """
    parser = argparse.ArgumentParser(description="Compiles the native CPU kernels.")
    parser.add_argument("--force", action="store_true", help="even if it is current")
    is_forced = parser.parse_args(arguments).force
    if is_current() and not is_forced:
        print(f"{LIBRARY} is current")
        return 0
    if reason := why_not():
        print(f"jaxbnb has no native CPU kernels: {reason}", file=sys.stderr)
        return 1
    import jax.ffi

    try:
        build(LIBRARY, Path(jax.ffi.include_dir()))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"built {LIBRARY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
