"""The tests of native CPU kernels, for `make sanitize` and `make arm`.

They are the kernels' own, and the contracts of ops where a test asks for the kernels by
name. Tests that get a kernel by default are not among them, as those of models and
optimizers.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
_CONTRACTS = (
    *("attend_dense", "checks", "embed_blockwise", "matmul_blockwise", "matmul_dense"),
    *("matmul_int8", "nested", "quantize_blockwise"),
)
TESTS = (
    *sorted(FOLDER.glob("test_cpu_*.py")),
    *(FOLDER / f"test_{name}.py" for name in _CONTRACTS),
)
# Products of integers, which have kernels of their own for some instruction sets.
INT8_TESTS = tuple(path for path in TESTS if "int8" in path.name)
OPTIONS = (
    *("-k", "cpu or test_attend_dense or test_matmul_dense", "-m", "not exhaustive"),
    *("-q", "--quick-compile", "-p", "no:cacheprovider"),
)
