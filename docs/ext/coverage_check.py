"""Warns of public names that the documentation leaves out; ``-W`` makes that an error.

Public is what a module of ``coverage_check_modules`` lists in its ``__all__``. A name
is covered under any of its public paths: `jaxbnb.core.quantize` by `jaxbnb.quantize`.
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
                # Under its other paths it is missing too; once is enough.
                covered.add(id(found))


def _resolve(path: str) -> Any:
    """What a dotted path names, or an object of its own where it names nothing."""
    names = path.split(".")
    found: Any = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], start=2):
        if not hasattr(found, name) and isinstance(found, types.ModuleType):
            importlib.import_module(".".join(names[:i]))
        found = getattr(found, name, None)
        if found is None:
            return object()
    return found
