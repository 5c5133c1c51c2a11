"""The option ``--quick-compile``, for the tests and for the examples of the docs."""

import os
from importlib import metadata


def pytest_addoption(parser):
    parser.addoption(
        "--quick-compile",
        action="store_true",
        help="compile for a third of the time, unless XLA_FLAGS is set",
    )


def pytest_configure(config):
    if config.getoption("quick_compile"):
        # Read when the first array is made.
        os.environ.setdefault("XLA_FLAGS", " ".join(_flags()))


def pytest_report_header(config):
    return f"XLA_FLAGS: {os.environ.get('XLA_FLAGS') or 'none'}"


def _flags():
    """Compiling is most of what tests do, and most of it optimises what runs once."""
    flags = ["--xla_backend_optimization_level=0"]
    if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 12):
        # XLA writes LLVM's code itself, not by way of MLIR, which takes twice as long.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return flags
