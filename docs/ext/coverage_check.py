"""Warns of public names that the documentation leaves out; ``-W`` makes that an error.

A name is public if a module in ``coverage_check_modules`` lists it in ``__all__``. Any
of its public paths may document it: `jaxbnb.quantize` covers `jaxbnb.core.quantize`.
"""

import importlib
import types
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("coverage_check_modules", [], "env", list)
    app.connect("env-check-consistency", _check)
    return {"version": "1", "parallel_read_safe": True}


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domains.python_domain.objects
    covered = {id(_resolve(path)) for path in documented}
    for name in app.config.coverage_check_modules:
        module = importlib.import_module(name)
        for path in [name, *(f"{name}.{public}" for public in module.__all__)]:
            found = _resolve(path)
            if path not in documented and id(found) not in covered:
                logger.warning("%s is public and not documented", path, type="coverage")
                # Warn once, although its other paths are missing too.
                covered.add(id(found))


def _resolve(path: str) -> Any:
    """Returns what a dotted path names, or a new object if it does not exist."""
    names = path.split(".")
    found: Any = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], start=2):
        if not hasattr(found, name) and isinstance(found, types.ModuleType):
            importlib.import_module(".".join(names[:i]))
        found = getattr(found, name, None)
        if found is None:
            return object()
    return found
