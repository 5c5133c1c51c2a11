"""Checks the GPU kernels on this machine's GPU, and records the outcome.

Machine code that a compiler accepts may still give wrong numbers on a GPU, end the
process, or never return. So each op's kernels run in a child process, where `checks`
compares their numbers with NumPy's. A record holds for a kind of GPU and for the
versions of jax, CUDA and these kernels.

Nothing here runs while a program is lowered. `verify` is for users, behind
``jaxbnb verify-kernels``; `verify_if_needed` is for jaxbnb's own commands. The child
process runs `main`.
"""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp

from jaxbnb_kernels import _records, _selection, checks, child
from jaxbnb_kernels._config import config

logger = logging.getLogger("jaxbnb")

# A compilation takes a second or two, and an op has up to 18.
TIME_LIMIT: Final = 300.0
# The child prints this line; whatever happens after it is the kernels' doing.
_READY: Final = "the GPU is ready"
# SIGHUP, SIGINT, SIGKILL and SIGTERM: somebody ended the process.
_SENT_SIGNALS: Final = {1, 2, 9, 15}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of an op's checks.

    Attributes:
        reason: why the kernels must not run; None if they passed.
        is_final: whether the same checks would end the same way again. Only such
            verdicts are recorded.
    """

    reason: str | None
    is_final: bool


def verify(
    ops: Sequence[str] | None = None,
    *,
    report: Callable[[str, str, Verdict], None] | None = None,
    out: pathlib.Path | None = None,
) -> dict[str, Verdict]:
    """Checks the kernels on this machine's GPUs, and lets those run that pass.

    Each op takes less than a minute as a rule, in a process of its own. The outcome is
    kept in the user's data folder (``$XDG_DATA_HOME/jaxbnb/verified.json``, or
    ``~/.local/share/jaxbnb/verified.json``). Later programs of the user then run these
    kernels by themselves, as long as `jaxbnb_kernels.config` says "verified".

    Args:
        ops: names of the ops to check; None for all that have kernels.
        report: called after each op with the kind of GPU, the op and the verdict.
        out: file to write the records to, instead of the user's own; such a file can
            ship with the package, as ``_verified.json``.

    Returns:
        The verdict on each op; where GPUs of several kinds are present, its worst.

    Raises:
        ValueError: an op is unknown, or does not have kernels.
        NotImplementedError: this machine has no GPU that kernels are written for, or
            none that those of a named op are.
        OSError: the outcome cannot be written to the data folder.

    Example:
        >>> import jaxbnb_kernels
        >>> try:
        ...     verdicts = jaxbnb_kernels.verify()
        ... except NotImplementedError as error:
        ...     print(str(error).split("; ")[1])
        this is a CPU
    """
    named = list(ops or ())
    ops = list(checks.CHECKS) if ops is None else named
    if unknown := sorted(set(ops) - set(checks.CHECKS)):
        raise ValueError(
            f"no kernels to check for {', '.join(unknown)}; choose from "
            f"{', '.join(checks.CHECKS)}"
        )
    devices = _devices()
    for op in named:
        if all(reasons := [why_none(op, device) for device in devices]):
            raise NotImplementedError(f"{op}: {reasons[0]}")
    if not _can_start_python():
        raise NotImplementedError(
            "kernels are checked in a new Python process, which this program cannot "
            "start: run `jaxbnb verify-kernels` from an installed jaxbnb"
        )
    verdicts: dict[str, Verdict] = {}
    records: list[_records.Record] = []
    for device in devices:
        for op in ops:
            if why_none(op, device):
                continue
            verdict = run(command(op), environment(device.local_hardware_id))
            if verdict.is_final:
                record = _record(op, device, verdict.reason)
                records.append(record)
                if out is None:
                    _records.write(record)
                else:
                    _records.write_to(out, records)
            if report is not None:
                report(device.device_kind, op, verdict)
            if op not in verdicts or verdict.reason is not None:
                verdicts[op] = verdict
    return verdicts


def verify_if_needed(
    announce: Callable[[str], None],
    report: Callable[[str, str, Verdict], None] | None = None,
) -> None:
    """Checks the kernels where this machine's GPU has no record of them yet.

    For commands that run a model: never called while a program is lowered. It does
    nothing without a GPU that has kernels, in a program of several processes, or where
    `jaxbnb_kernels.config.mosaic_gpu` is not "verified". Whatever goes wrong is logged,
    and the command runs without kernels.

    Args:
        announce: called with the kind of GPU before the first check, if there is any.
        report: see `verify`.
    """
    if config.mosaic_gpu != "verified" or jax.process_count() > 1:
        return
    try:
        devices = _devices()
        missing = [op for op in checks.CHECKS if not _has_records(op, devices)]
        if missing and _can_start_python():
            announce(devices[0].device_kind)
            verify(missing, report=report)
    except NotImplementedError:
        return
    except Exception:
        logger.exception("jaxbnb could not check its kernels, and runs without them")


def _can_start_python() -> bool:
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def why_no_kernels(device: Any) -> str | None:
    """Why no kernel runs on a device of JAX, whatever the settings; None if some do."""
    return _selection.why_not_on(device)


def why_off(op: str, device: Any) -> str | None:
    """Why an op's kernels do not run by themselves on a device, or None."""
    gpu = _selection.describe(device)
    if gpu is None:
        return why_no_kernels(device)
    kernel = _selection.Kernel(op, "")
    return _selection.why_not(kernel, [gpu], config.mosaic_gpu, _selection.records())


def why_none(op: str, device: Any) -> str | None:
    """Why an op has no kernels for a device, whatever the settings; None if it does."""
    gpu = _selection.describe(device)
    if gpu is None:
        return why_no_kernels(device)
    return _selection.why_not(_selection.Kernel(op, ""), [gpu], "always", ())


def records_file() -> pathlib.Path | None:
    """The file of this user's records; None where there is no home directory."""
    return _records.user_file()


def _devices() -> list[Any]:
    """One GPU of this machine of each kind that has kernels."""
    devices = jax.local_devices()
    reasons = [_selection.why_not_on(device) for device in devices]
    supported = {
        device.device_kind: device
        for device, reason in zip(devices, reasons, strict=True)
        if reason is None
    }
    if not supported:
        raise NotImplementedError(reasons[0])
    return list(supported.values())


def _has_records(op: str, devices: Sequence[Any]) -> bool:
    known = _selection.records()
    gpus = [_selection.describe(d) for d in devices if not why_none(op, d)]
    return all(gpu and _records.find(known, op, gpu) for gpu in gpus)


def _record(op: str, device: Any, reason: str | None) -> _records.Record:
    return _records.Record(
        op=op,
        device_kind=device.device_kind,
        cuda=device.client.platform_version,
        jax=_records.jax_versions(),
        digest=_records.digest(),
        reason=reason,
    )


def command(op: str, implementation: str = "mosaic_gpu") -> list[str]:
    """The command line that checks an op in a new process."""
    return child.command("jaxbnb_kernels.verification", "main", op, implementation)


def environment(device_id: int) -> dict[str, str]:
    """Environment for a child process that sees one GPU, and no settings of JAX."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return kept | {
        "JAX_PLATFORMS": "cuda",
        "JAX_CUDA_VISIBLE_DEVICES": str(device_id),
        # This process may hold nearly all of the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAXBNB_MOSAIC_GPU": "1",
    }


def run(
    command: list[str], environment: dict[str, str], time_limit: float = TIME_LIMIT
) -> Verdict:
    """Runs the checks of an op in a child process, and reads their outcome."""
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
        return Verdict(f"the process that checks them could not start: {error}", False)
    except subprocess.TimeoutExpired as expired:
        is_ready = _READY in _lines(expired.stdout)
        return Verdict(f"they had not returned after {time_limit:g} s", is_ready)
    output, status = _lines(process.stdout), process.returncode
    # Libraries may print lines of their own.
    verdicts = [line for line in output if line.startswith('{"reason":')]
    if status == 0 and verdicts:
        return Verdict(**json.loads(verdicts[-1]))
    end = f"ended with status {status}"
    if status < 0:
        end = f"was ended by signal {-status} ({signal.strsignal(-status)})"
    *_, complaint = ["", *_lines(process.stderr)]
    # A signal that somebody sent, or a lack of memory, says nothing of the kernels.
    is_final = _READY in output and -status not in _SENT_SIGNALS
    is_final &= b"out of memory" not in process.stderr.lower()
    return Verdict(f"the process that checked them {end}: {complaint}", is_final)


def _lines(printed: bytes | None) -> list[str]:
    return (printed or b"").decode(errors="replace").splitlines()


def main(op: str, implementation: str = "mosaic_gpu") -> None:
    """Checks an op, and prints the verdict."""
    jnp.ones(8).block_until_ready()
    print(_READY, flush=True)
    verdict = verdict_on(checks.CHECKS[op](implementation, checks.FULL))
    print(json.dumps(dataclasses.asdict(verdict)))


def verdict_on(errors: Iterable[tuple[str, float]]) -> Verdict:
    """Returns the verdict on an op: its first failed check, or none."""
    try:
        for what, error in errors:
            if not error <= 1:
                reason = f"wrong numbers ({what}: {error:.3g} x the allowed error)"
                return Verdict(reason, True)
    except Exception as error:
        first_line, *_ = [*str(error).splitlines(), ""]
        is_final = "RESOURCE_EXHAUSTED" not in str(error)
        return Verdict(f"{type(error).__name__}: {first_line}", is_final)
    return Verdict(None, True)
