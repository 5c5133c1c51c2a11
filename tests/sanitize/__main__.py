"""Whether the native CPU kernels stay inside their arrays: `make sanitize`.

    python tests/sanitize [PYTEST_ARGUMENT ...]

Compiles the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, into a folder
that is deleted afterwards, and runs the kernels' own tests on them, and the contracts
of ops where a test asks for the kernels by name. The first read or write outside of an
array, and the first undefined operation, ends the run.

It leaves out tests that get a kernel by default, as those of models and optimizers, the
instruction sets that this processor lacks, and data races between threads.

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

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests/kernels"
# Contracts that the kernels share with other implementations.
CONTRACTS = ["attend_dense", "checks", "embed_blockwise", "matmul_blockwise"]
CONTRACTS += ["matmul_dense", "matmul_int8", "nested", "quantize_blockwise"]
TESTS = [*sorted(FOLDER.glob("test_cpu_*.py"))]
TESTS += [FOLDER / f"test_{name}.py" for name in CONTRACTS]
CHOSEN_TESTS = ["-k", "cpu or test_attend_dense or test_matmul_dense"]
CHOSEN_TESTS += ["-m", "not exhaustive"]
OPTIONS = {
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
        command += ["-q", "--capture=sys", "--quick-compile", "-p", "no:cacheprovider"]
        command += [*CHOSEN_TESTS, *sys.argv[1:]]
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(runtimes)}
        return subprocess.run([*command, *map(str, TESTS)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
