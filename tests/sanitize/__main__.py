"""Whether the native CPU kernels stay inside their arrays: `make sanitize`.

    python tests/sanitize [PYTEST_ARGUMENT ...]

Compiles the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, into a folder
that is deleted afterwards, and runs the tests of `tests/kernels/cpu_tests.py` on them.
The first read or write outside of an array, and the first undefined operation, ends the
run. It does not look for data races between threads, nor at the instruction sets that
this processor lacks.

Each buffer that XLA allocates has guarded memory around it, because the sanitizer's
`malloc` replaces the one of the process.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.ffi

from jaxbnb_kernels._cpu import build

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from cpu_tests import OPTIONS, TESTS

ROOT = Path(__file__).parents[2]
SANITIZERS = {
    # Python and XLA keep memory until they end, which is no fault of the kernels.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "JAX_PLATFORMS": "cpu",
}


def find_runtimes(compiler: str) -> list[str]:
    """The compiler's libraries that have to be there before Python's `malloc`."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.check_output(
            [compiler, f"-print-file-name={name}"], text=True
        ).strip()
        for name in names
    ]
    if missing := [path for path in found if not Path(path).is_absolute()]:
        sys.exit(f"{compiler} has no {', '.join(missing)}: install its sanitizers")
    return found


def main() -> int:
    compiler = os.environ.get("CXX", "c++")
    runtimes = find_runtimes(compiler)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_native.so"
        include = Path(jax.ffi.include_dir())
        build.build(library, include, compiler=compiler, sanitize=True)
        command = [sys.executable, "-m", "pytest", f"--native-library={library}"]
        # The report of the sanitizer is not captured.
        command += ["--capture=sys", *OPTIONS, *sys.argv[1:]]
        environment = {**os.environ, **SANITIZERS, "LD_PRELOAD": " ".join(runtimes)}
        return subprocess.run([*command, *map(str, TESTS)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
