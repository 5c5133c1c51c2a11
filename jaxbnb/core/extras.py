"""Imports of optional dependencies, which an extra of the package installs."""

import importlib
from types import ModuleType
from typing import Final

# jaxbnb is not on a package index yet; see docs/install.md.
INSTALL: Final = "pip install '.[{extra}]' in a checkout of jaxbnb"


def import_extra(
    module: str, *, needed_by: str, extra: str | None = None
) -> ModuleType:
    """Imports an optional dependency, or says how to install it.

    Args:
        module: import name, e.g. "safetensors" or "safetensors.numpy".
        needed_by: package or function that needs it, e.g. "jaxbnb.convert".
        extra: extra of jaxbnb that installs it, e.g. "convert"; None if there is none.

    Raises:
        ImportError: the package is not installed. Errors from inside an installed
            module are not caught.

    Example:
        >>> import_extra("json", needed_by="jaxbnb.convert", extra="convert").loads("7")
        7
        >>> import_extra("no_such", needed_by="jaxbnb.convert", extra="convert")
        Traceback (most recent call last):
        ImportError: jaxbnb.convert needs no_such: pip install '.[convert]' in a
        checkout of jaxbnb
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        how = f"pip install {package}" if extra is None else INSTALL.format(extra=extra)
        raise ImportError(
            f"{needed_by} needs {package}: {how}", name=package
        ) from error
