"""Commands that run this process's code, whatever is in the current folder.

``python -m`` and ``python -c`` put the current folder first on the path, so a
``json.py`` there would run instead of the standard library's.
"""

import pathlib
import sys
from typing import Final

# Only the packages come from that folder, which may also have a ``json.py``.
_START: Final = """
import importlib, importlib.machinery, importlib.util, sys
folder, packages, module, function, *arguments = sys.argv[1:]
for name in packages.split():
    spec = importlib.machinery.PathFinder.find_spec(name, [folder])
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
getattr(importlib.import_module(module), function)(*arguments)
"""


def command(
    module: str,
    function: str,
    *arguments: str,
    packages: tuple[str, ...] = ("jaxbnb_kernels",),
) -> list[str]:
    """Returns the command that calls ``module.function(*arguments)`` in a new process.

    Args:
        module: full name of a module in one of ``packages``.
        function: name of a function that takes strings.
        *arguments: arguments of the function.
        packages: names of packages next to this one. They are imported in this order,
            from the same files as in this process. Everything else is found as usual,
            except that the current folder is not searched.
    """
    # -P keeps the current folder off the path. E and s are as in this process.
    options = f"-P{'E' * sys.flags.ignore_environment}{'s' * sys.flags.no_user_site}"
    folder = str(pathlib.Path(__file__).parents[1])
    names = " ".join(packages)
    # fmt: off
    return [
        sys.executable, options, "-c", _START, folder, names, module, function,
        *arguments,
    ]
    # fmt: on
