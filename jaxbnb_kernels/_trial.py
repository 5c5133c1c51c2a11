"""Whether an op's kernels work on this machine's GPU: tried once, and written down.

What a compiler accepts may still give wrong numbers on a GPU, end the process, or never
return. So the first time that an op is compiled for a GPU of this machine, its kernels
run in a process of their own, and `_checks` compares their numbers with NumPy's. A
verdict holds for a kind of GPU, and for the versions of jax, CUDA and these kernels.

`main` is what that process runs.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any, Final

import jax
from jaxlib.version import __version__ as jaxlib_version

from jaxbnb_kernels import _child

logger = logging.getLogger("jaxbnb")

# A compilation takes a second or two, and an op has up to 18.
TIME_LIMIT: Final = 300.0
# The line after which whatever happens is the kernels' doing.
_READY: Final = "the GPU is ready"
# Signals of whoever ends a process: SIGHUP, SIGINT, SIGKILL and SIGTERM.
_SENT: Final = {1, 2, 9, 15}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a trial.

    Attributes:
        reason: why the kernels are not to be used, or None.
        is_final: whether another trial would end the same way, so that it is kept.
    """

    reason: str | None
    is_final: bool


def why_not(op: str, device: Any) -> str | None:
    """Why the kernels of an op are not to be used on a GPU of this machine, or None."""
    if jax.process_count() > 1:
        # Which must all compile the same.
        return "not tried where there are several processes: set JAXBNB_MOSAIC_GPU"
    with _lock:
        return _verdict(op, device).reason


@functools.cache
def _verdict(op: str, device: Any) -> Verdict:
    try:
        return _kept_or_new(op, device)
    except Exception as error:
        # Whatever it is, a program is compiled without.
        logger.exception("jaxbnb could not try the kernels of %s", op)
        return Verdict(f"they could not be tried: {error}", False)


def _kept_or_new(op: str, device: Any) -> Verdict:
    path = folder(device) / f"{op}.json"
    if known := _read(path):
        return known
    if getattr(sys, "frozen", False):
        return Verdict("not tried, as this program is no Python to start again", False)
    logger.warning(
        "jaxbnb tries the kernels of %s on this %s, once, for a minute at most or so",
        op,
        device.device_kind,
    )
    verdict = run(command(op), environment(device.local_hardware_id), TIME_LIMIT)
    if verdict.reason is not None:
        logger.warning(
            "XLA compiles %s here, not jaxbnb's kernels: %s", op, verdict.reason
        )
    if verdict.is_final:
        _write(path, verdict)
    return verdict


def folder(device: Any) -> pathlib.Path:
    """Where the verdicts on these kernels, with this jax, CUDA and GPU, are."""
    digest = hashlib.sha256(f"{jax.__version__} {jaxlib_version}".encode())
    digest.update(device.client.platform_version.encode())
    digest.update(_source())
    # Where there is no home, expanduser leaves "~": then nothing is found, or kept.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = re.sub(r"\W+", "-", device.device_kind)
    return pathlib.Path(cache) / "jaxbnb" / f"{name}-{digest.hexdigest()[:16]}"


@functools.cache
def _source() -> bytes:
    """Of all kernels."""
    package = pathlib.Path(__file__).parent
    return b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))


def command(op: str, implementation: str = "mosaic_gpu") -> list[str]:
    """What tries an op."""
    return _child.command("jaxbnb_kernels._trial", "main", op, implementation)


def environment(device_id: int) -> dict[str, str]:
    """Of a process that has that GPU, beside this one, and no other settings of jax."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return kept | {
        "JAX_PLATFORMS": "cuda",
        "JAX_CUDA_VISIBLE_DEVICES": str(device_id),
        # This process may hold nearly all of the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAXBNB_MOSAIC_GPU": "1",
    }


def run(command: list[str], environment: dict[str, str], time_limit: float) -> Verdict:
    """Tries an op in a process of its own."""
    try:
        process = subprocess.run(
            command,
            env=environment,
            timeout=time_limit,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        return Verdict(f"no process could be started to try them: {error}", False)
    except subprocess.TimeoutExpired as expired:
        is_ready = _READY in _lines(expired.stdout)
        return Verdict(f"they had not returned after {time_limit:g} s", is_ready)
    output, status = _lines(process.stdout), process.returncode
    # Whatever else was printed beside it.
    verdicts = [line for line in output if line.startswith('{"reason":')]
    if status == 0 and verdicts:
        return Verdict(**json.loads(verdicts[-1]))
    end = f"ended with status {status}"
    if status < 0:
        end = f"was ended by signal {-status} ({signal.strsignal(-status)})"
    *_, complaint = ["", *_lines(process.stderr)]
    # What somebody sent, or a lack of memory, is of this moment, not of the kernels.
    is_final = _READY in output and -status not in _SENT
    is_final &= b"out of memory" not in process.stderr.lower()
    return Verdict(f"the process that tried them {end}: {complaint}", is_final)


def _lines(printed: bytes | None) -> list[str]:
    return (printed or b"").decode(errors="replace").splitlines()


def main(op: str, implementation: str = "mosaic_gpu") -> None:
    """Tries an op, and prints the verdict."""
    import jax.numpy as jnp

    from jaxbnb_kernels import _checks

    jnp.ones(8).block_until_ready()
    print(_READY, flush=True)
    verdict = verdict_on(_checks.CHECKS[op](implementation))
    print(json.dumps(dataclasses.asdict(verdict)))


def verdict_on(checks: Iterable[tuple[str, float]]) -> Verdict:
    """What follows from the checks of an op: the first that fails decides."""
    try:
        for what, error in checks:
            if not error <= 1:
                reason = f"wrong numbers ({what}: {error:.3g} x the allowed error)"
                return Verdict(reason, True)
    except Exception as error:
        first_line, *_ = [*str(error).splitlines(), ""]
        is_final = "RESOURCE_EXHAUSTED" not in str(error)
        return Verdict(f"{type(error).__name__}: {first_line}", is_final)
    return Verdict(None, True)


def _read(path: pathlib.Path) -> Verdict | None:
    try:
        return Verdict(json.loads(path.read_text())["reason"], True)
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or not ours.
        return None


def _write(path: pathlib.Path, verdict: Verdict) -> None:
    """Whole or not at all: other processes may do the same."""
    try:
        if not path.is_absolute():
            raise FileNotFoundError(
                "there is no home directory, or its name is relative"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"reason": verdict.reason}))
        part.replace(path)
    except OSError as error:
        logger.warning("jaxbnb cannot write %s, and will try again: %s", path, error)
