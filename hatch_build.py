"""Compiles the native CPU kernels while a wheel is built, if there is a C++ compiler.

Without a compiler, or with ``JAXBNB_NATIVE=0``, the wheel has Python files only: XLA
then computes what the kernels would.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
KERNELS = ROOT / "jaxbnb_kernels" / "_cpu"
LIBRARY = KERNELS / "_native.so"
# The oldest that jaxbnb runs with: XLA's interface accepts libraries older than itself.
JAXLIB = "jaxlib==0.10.2"


class NativeKernels(BuildHookInterface):
    """Adds the library to a wheel, which is then for one platform."""

    def dependencies(self) -> list[str]:
        """The package with XLA's headers, if the environment does not have it."""
        is_needed = _why_not() is None and not _is_current() and _headers() is None
        return [JAXLIB] if is_needed else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library, unless it is newer than its sources."""
        reason = _why_not()
        if reason is None and not _is_current():
            reason = _build()
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


def _why_not() -> str | None:
    if os.environ.get("JAXBNB_NATIVE") == "0":
        return "JAXBNB_NATIVE is 0"
    if not sys.platform.startswith("linux"):
        return f"they are for Linux; this is {sys.platform}"
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler, {_compiler()}"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _headers() -> Path | None:
    """Finds XLA's headers: here, or where jaxbnb is installed into."""
    spec = importlib.util.find_spec("jaxlib")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    # pip hides this folder from a build, but uses the interpreter that it belongs to.
    folders.append(str(Path(sysconfig.get_path("platlib")) / "jaxlib"))
    paths = (Path(folder) / "include" for folder in folders)
    return next((p for p in paths if (p / "xla/ffi/api/ffi.h").exists()), None)


def _is_current() -> bool:
    """Whether the library is there, and newer than its sources."""
    sources = [*KERNELS.glob("*.cc"), *KERNELS.glob("*.h"), KERNELS / "build.py"]
    newest = max(path.stat().st_mtime for path in sources)
    return LIBRARY.exists() and LIBRARY.stat().st_mtime > newest


def _build() -> str | None:
    """Compiles the library; returns why it could not, or None."""
    include = _headers()
    if include is None:
        return f"{JAXLIB} has no headers"
    spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.build(LIBRARY, include, compiler=_compiler())
    except (RuntimeError, FileNotFoundError) as error:
        return str(error)
    return None
