"""What the plots of benchmarks share: matplotlib, and colours."""

from types import ModuleType
from typing import Any, Final

from jaxbnb.core.extras import import_extra

# Okabe and Ito's, which colour-blind people can tell apart.
COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
GREY: Final = "#a6a6a6"


def import_pyplot() -> ModuleType:
    """Imports matplotlib.pyplot, set up to draw to files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    options: dict[str, Any] = {"needed_by": "`jaxbnb bench --plot`", "extra": "plots"}
    import_extra("matplotlib", **options).use("Agg")
    return import_extra("matplotlib.pyplot", **options)
