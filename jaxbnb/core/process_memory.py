"""The memory of this process, as its device or operating system counts it."""

import re
import sys
from pathlib import Path
from typing import Final

import jax

_STATUS: Final = Path("/proc/self/status")


def resident_bytes() -> int:
    """Returns the memory that this process holds now; Linux only."""
    return _read("VmRSS")


def peak_bytes() -> int | None:
    """Returns the most memory that this process has held, or None if it is unknown.

    `resource.getrusage` would also count what the parent held: a program that a large
    process starts begins with that process's peak.
    """
    if _STATUS.exists():
        return _read("VmHWM")
    if sys.platform != "darwin":
        return None
    import resource  # Does not exist on Windows.

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_device_bytes() -> int | None:
    """Returns the most memory that the first device has held.

    That of the process if the device does not count, as CPUs; None if neither is
    known.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return peak_bytes()


def reset_peak() -> None:
    """Lets the peak start again from what the process holds now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def _read(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
