"""Compiles the native CPU kernels while a wheel is built, if there is a C++ compiler.

Without a compiler, or with ``JAXBNB_NATIVE=0``, the wheel has Python files only: XLA
then computes what the kernels would.
"""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).parent / "jaxbnb_kernels" / "_cpu"
# The oldest that jaxbnb runs with: XLA's interface accepts libraries older than itself.
# Pythons that it was not published for have none that is older.
JAXLIB = (
    "jaxlib==0.10.2; python_version < '3.15'",
    "jaxlib; python_version >= '3.15'",
)


class NativeKernels(BuildHookInterface):
    """Adds the library to a wheel, which is then for one platform."""

    def dependencies(self) -> list[str]:
        """The package with XLA's headers, if the environment does not have it."""
        build = _load_build()
        is_needed = not build.is_current() and build.why_not() is None
        return [*JAXLIB] if is_needed and _headers() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library, unless it is there and of these sources."""
        build = _load_build()
        reason = build.why_not()
        if reason is None and not build.is_current():
            reason = _compile(build)
        if reason is not None:
            self.app.display_warning(
                f"jaxbnb is built without native CPU kernels: {reason}"
            )
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        # No Python interface is in the library: it serves every version.
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append("jaxbnb_kernels/_cpu/_native.so")


def _load_build() -> Any:
    """Imports what compiles the library, without jaxbnb, which needs jax."""
    spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _headers() -> Path | None:
    """Finds XLA's headers: here, or where jaxbnb is installed into."""
    spec = importlib.util.find_spec("jaxlib")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    # pip hides this folder from a build, but uses the interpreter that it belongs to.
    folders.append(str(Path(sysconfig.get_path("platlib")) / "jaxlib"))
    paths = (Path(folder) / "include" for folder in folders)
    return next((p for p in paths if (p / "xla/ffi/api/ffi.h").exists()), None)


def _compile(build: Any) -> str | None:
    """Compiles the library; returns why it could not, or None."""
    include = _headers()
    if include is None:
        return "jaxlib has no headers"
    try:
        build.build(build.LIBRARY, include)
    except (RuntimeError, FileNotFoundError) as error:
        return str(error)
    return None
