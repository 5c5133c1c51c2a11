"""The numeric core of jaxbnb: arrays in, arrays out; needs jax and numpy only.

README.md in this folder has a diagram of its floors, and follows one op from the call
to the instruction.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxbnb_kernels._config import config as config
    from jaxbnb_kernels.verification import verify as verify

__all__ = ["config", "verify"]

# Imported when they are first used, so that importing this package imports nothing.
_MODULES = {
    "config": "jaxbnb_kernels._config",
    "verify": "jaxbnb_kernels.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
